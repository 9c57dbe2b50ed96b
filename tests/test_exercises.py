"""The ten exercises: solutions pass, templates are not done yet, and each wrong solution is told its misconception."""

import pytest
from click.testing import CliRunner

from batchnorm.cli import commands, learn_exercises
from batchnorm.language import LANGUAGES, catalog, speaking
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.check import Result, check, judged
from batchnorm.learn.exercises.process import Job, results, tasks_of
from batchnorm.learn.exercises.tasks import TASKS

MISCONCEPTIONS = {name: text for name, text in vars(why).items() if name.isupper()}

# Task, what to replace in the solution and by what, and the misconception.
WRONG = [
    (1, "MEAN = 1.0", "MEAN = 4", why.SUM_FOR_MEAN),
    (1, "0.025", "0.1", why.SUM_FOR_VARIANCE),
    (1, "0.025", "0.158", why.ROOT_FOR_VARIANCE),
    (1, "0.025", "0.0333", why.UNBIASED_IN_NORMALIZATION),
    (1, "[-1.26, 1.26, -0.63, 0.63]", "[-2, 2, -1, 1]", why.TUTORIALS_NUMBERS),
    (1, "[-1.26, 1.26, -0.63, 0.63]", "[-8, 8, -4, 4]", why.VARIANCE_FOR_ROOT),
    (1, "[-1.26, 1.26, -0.63, 0.63]", "[-1.1, 1.1, -0.55, 0.55]", why.UNBIASED_IN_NORMALIZATION),
    (1, "[-1.26, 1.26, -0.63, 0.63]", "[5.06, 7.59, 5.69, 6.96]", why.NOT_CENTERED),
    (1, "[-1.26, 1.26, -0.63, 0.63]", "[1.26, -1.26, 0.63, -0.63]", why.SIGN),
    (1, "[1.37, 2.63, 1.68, 2.32]", "[1, 3, 1.5, 2.5]", why.TUTORIALS_NUMBERS),
    (1, "[1.37, 2.63, 1.68, 2.32]", "[-0.63, 0.63, -0.32, 0.32]", why.BETA_FORGOTTEN),
    (1, "[1.37, 2.63, 1.68, 2.32]", "[0.74, 3.26, 1.37, 2.63]", why.GAMMA_FORGOTTEN),
    (1, "[1.37, 2.63, 1.68, 2.32]", "[-2.03, 3.03, -0.76, 1.76]", why.GAMMA_AND_BETA_EXCHANGED),
    (2, "torch.sqrt(variance + eps)", "(variance + eps)", why.VARIANCE_FOR_ROOT),
    (2, "torch.sqrt(variance + eps)", "(torch.sqrt(variance) + eps)", why.EPSILON_OUTSIDE),
    (2, "variance + eps", "variance", why.EPSILON_FORGOTTEN),
    (2, "((x - mean) ** 2).mean(0)", "x.var(0)", why.UNBIASED_IN_NORMALIZATION),
    (2, "normalized = (x - mean) /", "normalized = x /", why.NOT_CENTERED),
    (2, "normalized = (x - mean) /", "normalized = (mean - x) /", why.SIGN),
    (2, "return gamma * normalized", "return normalized", why.GAMMA_FORGOTTEN),
    (2, " + beta", "", why.BETA_FORGOTTEN),
    (2, "gamma * normalized + beta", "beta * normalized + gamma", why.GAMMA_AND_BETA_EXCHANGED),
    (2, ".mean(0)", ".mean(1, keepdim=True)", why.SAMPLE_STATISTICS),
    (2, ".mean(0)", ".mean()", why.ONE_MEAN_FOR_ALL),
    (
        2,
        "mean = x.mean(0)\n    variance = ((x - mean) ** 2).mean(0)",
        "mean = x.mean(1)\n    variance = x.var(1, correction=0)",
        why.SAMPLES_TAKEN_FOR_CHANNELS,
    ),
    (2, "((x - mean) ** 2).mean(0)", "(x**2).mean(0) - mean**2", why.SQUARES_CANCEL),
    (3, "dnormalized - through_mean - through_variance", "dnormalized", why.CONSTANT_STATISTICS),
    (3, " - through_variance", "", why.NO_PATH_THROUGH_VARIANCE),
    (3, " - through_mean", "", why.NO_PATH_THROUGH_MEAN),
    (3, "dy * gamma", "dy", why.GAMMA_FORGOTTEN_IN_GRADIENT),
    (3, ") / std\n    return", ")\n    return", why.GRADIENT_NOT_SCALED),
    (3, "(dy * normalized).sum(0)", "(dy * x).sum(0)", why.GAMMA_GRADIENT_WITH_X),
    (3, ".sum(0)", ".mean(0)", why.GRADIENTS_AVERAGED),
    (3, "(dy * normalized).sum(0), dy.sum(0)", "dy.sum(0), (dy * normalized).sum(0)", why.GRADIENTS_EXCHANGED),
    (
        4,
        'self.register_buffer("running_mean", torch.zeros(num_features))',
        "self.running_mean = torch.zeros(num_features)",
        why.NO_BUFFERS,
    ),
    (4, "torch.ones(num_features))\n\n", "torch.ones(num_features), persistent=False)\n\n", why.BUFFERS_NOT_PERSISTENT),
    (
        4,
        'self.register_buffer("running_var", torch.ones(num_features))',
        "self.running_var = nn.Parameter(torch.ones(num_features), requires_grad=False)",
        why.STATISTICS_ARE_PARAMETERS,
    ),
    (4, "nn.Parameter(torch.zeros(num_features))", "torch.zeros(num_features)", why.NO_PARAMETERS),
    (
        4,
        "self.running_mean.lerp_(mean, self.momentum)\n",
        "pass\n            self.running_mean = self.running_mean.lerp(mean, self.momentum)\n"
        "            with torch.no_grad():\n",
        why.GRAPH_KEPT,
    ),
    (
        4,
        "x.mean(0), x.var(0, correction=0)",
        "x.detach().mean(0), x.detach().var(0, correction=0)",
        why.NORMALIZED_BY_CONSTANTS,
    ),
    (
        4,
        "mean, variance = self.running_mean, self.running_var",
        "mean, variance = x.mean(0), x.var(0, correction=0)",
        why.EVALUATION_BY_BATCH,
    ),
    (
        4,
        "mean, variance = x.mean(0), x.var(0, correction=0)\n",
        "batch, mean, variance = x.mean(0), self.running_mean.clone(), self.running_var.clone()\n",
        why.NORMALIZED_BY_RUNNING,
    ),
    (
        4,
        "else:\n            mean, variance = self.running_mean, self.running_var",
        "else:\n            mean, variance = self.running_mean.clone(), self.running_var\n"
        "            self.running_mean.lerp_(x.mean(0), 0.1)",
        why.EVALUATION_UPDATES,
    ),
    (4, "self.running_mean.lerp_(mean, self.momentum)", "pass", why.NEVER_UPDATED),
    (
        4,
        "self.running_mean.lerp_(mean, self.momentum)",
        "self.running_mean.lerp_(mean, 1 - self.momentum)",
        why.MOMENTUM_REVERSED,
    ),
    (5, "axes = (0, 2, 3)", "axes = 0", why.MEAN_OVER_BATCH_ONLY),
    (5, "axes = (0, 2, 3)", "axes = (2, 3)", why.MEAN_OVER_PIXELS_ONLY),
    (5, "axes = (0, 2, 3)", "axes = (1, 2, 3)", why.MEAN_OF_A_SAMPLE),
    (5, "axes = (0, 2, 3)", "axes = (0, 1, 2, 3)", why.ONE_MEAN_FOR_ALL),
    (5, ".reshape(1, -1, 1, 1)", "", why.GAMMA_ALONG_WIDTH),
    (
        5,
        "mean = x.mean(axes, keepdim=True)\n    variance = ((x - mean) ** 2).mean(axes, keepdim=True)",
        "mean = x.mean(axes)\n    variance = x.var(axes, correction=0)",
        why.STATISTICS_ALONG_WIDTH,
    ),
    (5, "((x - mean) ** 2).mean(axes, keepdim=True)", "x.var(axes, keepdim=True)", why.UNBIASED_IN_NORMALIZATION),
    (5, "torch.sqrt(variance + eps)", "(torch.sqrt(variance) + eps)", why.EPSILON_OUTSIDE),
    (6, "correction=1", "correction=0", why.BIASED_RUNNING_VARIANCE),
    (
        6,
        "(1 - momentum) * running_var + momentum * unbiased",
        "momentum * running_var + (1 - momentum) * unbiased",
        why.MOMENTUM_REVERSED,
    ),
    (6, "(1 - momentum) * running_var + momentum * unbiased", "unbiased", why.NOT_AVERAGED),
    (6, "(1 - momentum) * running_var", "running_var", why.OLD_VALUE_KEPT_WHOLE),
    (6, "momentum * unbiased", "momentum * unbiased.sqrt()", why.STANDARD_DEVIATION_AVERAGED),
    (
        6,
        "torch.var(x, axes, correction=1)",
        "torch.var(x, axes, correction=0) * len(x) / (len(x) - 1)",
        why.COUNTED_SAMPLES_ONLY,
    ),
    (7, "math.log(1 - momentum)", "math.log(momentum)", why.MOMENTUM_REVERSED),
    (7, "math.ceil(math.log(1 - share) / math.log(1 - momentum))", "round(1 / momentum)", why.TIME_CONSTANT),
    (7, "math.ceil(math.log(1 - share) / math.log(1 - momentum))", "round(share / momentum)", why.STEPS_LIKE_A_LINE),
    (7, "math.ceil", "math.floor", why.ONE_BATCH_SHORT),
    (7, "math.ceil", "", why.NOT_ROUNDED),
    (7, "math.log(1 - share)", "math.log(share)", why.SHARE_OF_THE_OLD),
    (8, "3 / 5**0.5", "3 / 5", why.VARIANCE_FOR_ROOT),
    (8, "3 / 5**0.5", "1.16", why.UNBIASED_IN_NORMALIZATION),
    (8, "0.9 * 0 + 0.1 * 7", "6.3", why.MOMENTUM_REVERSED),
    (8, "0.9 * 0 + 0.1 * 7", "7", why.NOT_AVERAGED),
    (8, "0.1 * 20 / 3", "0.1 * 5", why.BIASED_RUNNING_VARIANCE),
    (8, "0.9 * 1 + 0.1 * 20 / 3", "1 + 0.1 * 20 / 3", why.OLD_VALUE_KEPT_WHOLE),
    (8, "(10 - RUNNING_MEAN) / RUNNING_VARIANCE**0.5", "IN_TRAINING", why.EVALUATED_BY_BATCH),
    (8, "(10 - RUNNING_MEAN) / RUNNING_VARIANCE**0.5", "1.16", why.EVALUATED_BY_TRUTH),
    (8, "(10 - RUNNING_MEAN)", "10", why.NOT_CENTERED),
    (8, "3 / (20 / 3) ** 0.5", "IN_TRAINING", why.UNBIASED_AFTER_MANY),
    (9, "scale[:, None]", "scale", why.SCALED_COLUMNS),
    (9, "torch.sqrt(running_var + eps)", "(running_var + eps)", why.VARIANCE_FOR_ROOT),
    (9, "running_var + eps", "running_var", why.EPSILON_FORGOTTEN),
    (9, "(bias - running_mean) * scale", "bias - running_mean * scale", why.BIAS_NOT_SCALED),
    (9, "(bias - running_mean) * scale", "bias * scale", why.MEAN_NOT_FOLDED),
    (9, "(bias - running_mean) * scale + beta", "(bias - running_mean + beta) * scale", why.BETA_SCALED),
    (9, "(bias - running_mean)", "-running_mean", why.OLD_BIAS_LOST),
    (10, "self.norm = nn.BatchNorm1d(16)", "self.norm = nn.Identity()", why.NORM_REMOVED),
    (10, "        if len(inputs) < 2:\n            continue\n", "", why.BATCH_OF_ONE),
    (10, ", bias=False", "", why.DEAD_BIAS),
    (10, "    model.eval()\n", "", why.EVAL_FORGOTTEN),
    (10, "    model.train()\n", "    model.eval()\n", why.TRAIN_FORGOTTEN),
    (10, "    model.eval()\n    with", "    model.train()(x)\n    model.eval()\n    with", why.EVAL_FORGOTTEN),
]


def namespace(code: str) -> dict:
    found = {"__name__": "exercise"}
    exec(compile(code, "exercise.py", "exec"), found)
    return found


def replaced(number: int, old: str, new: str) -> dict:
    solution = TASKS[number].solution
    assert old in solution
    return namespace(solution.replace(old, new))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_solutions_pass_and_templates_are_not_done_yet(task):
    assert judged(task, namespace(task.solution)).state == "ok"
    assert judged(task, namespace(task.file())).state == "not done yet"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("number", "old", "new", "misconception"), WRONG)
def test_a_wrong_solution_is_told_its_misconception(number, old, new, misconception, language):
    with speaking(language):
        result = judged(TASKS[number], replaced(number, old, new))
    expected = misconception if language == "en" else catalog("zh")[misconception]
    assert (result.state, result.told) == (
        "wrong",
        expected.format(name="hidden") if "{name}" in expected else expected,
    )


def test_every_misconception_is_tested():
    assert set(MISCONCEPTIONS.values()) == {misconception for *_, misconception in WRONG}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (1, "import numpy as np\nMEAN, VARIANCE = np.float64(1), 0.025\nNORMALIZED = np.array([-1.26, 1.26, -0.63, 0.63])\n"
         "OUTPUT = (1.37, 2.63, 1.68, 2.32)"),
        (2, "import numpy as np\ndef forward(x, gamma, beta, eps):\n"
         "    return gamma * (x - x.mean(0)) / np.sqrt(np.var(x, axis=0) + eps) + beta"),
        (3, "import numpy as np\ndef backward(dy, x, gamma, eps):\n"
         "    s = np.sqrt(x.var(axis=0) + eps)\n    n = (x - np.mean(x, axis=0)) / s\n    d = dy * gamma\n"
         "    return [(d - d.mean(0) - n * (d * n).mean(0)) / s, (dy * n).sum(0), dy.sum(0)]"),
        (5, "import numpy as np\nimport torch\ndef forward_images(x, gamma, beta, eps):\n"
         "    x = np.moveaxis(np.asarray(x), 1, -1)\n    axes = (0, 1, 2)\n"
         "    return np.moveaxis(gamma * (x - x.mean(axes)) / np.sqrt(x.var(axes) + eps) + beta, -1, 1)"),
        (6, "import numpy as np\ndef update_running_variance(old, x, momentum):\n"
         "    return old + momentum * (np.var(x, axis=(0, *range(2, x.ndim)), ddof=1) - old)"),
        (7, "import numpy as np\nbatches = lambda momentum, share: int(np.ceil(np.log1p(-share) / np.log1p(-momentum)))"),
        (9, "import numpy as np\ndef fold(w, b, gamma, beta, mean, var, eps):\n    scale = gamma / np.sqrt(var + eps)\n"
         "    return (w.T * scale).T, (b - mean) * scale + beta"),
    ],
)  # fmt: skip
def test_numpy_passes_too(number, code):
    assert judged(TASKS[number], namespace(code)) == Result(number, "ok")


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (2, "", "forward is missing: define it"),
        (2, "forward = 3", "forward is int; define a function"),
        (2, "def forward(x): return x", "takes 1 positional argument"),
        (2, "def forward(x, g, b, e): return x[0]", "forward has shape (4,); it must have shape (4, 4)"),
        (2, "def forward(x, g, b, e): return 'y'", "forward is str; it must be numbers"),
        (2, "def forward(x, g, b, e): return x * 0 + 3", "forward[0, 0] is 3; it must be "),
        (2, "def forward(x, g, b, e): return x * float('nan')", "forward[0, 0] is nan; it must be "),
        (2, "def forward(x, g, b, e):\n    x -= 1\n    return x", "changes its argument in place"),
        (2, "def forward(x, g, b, e): pass", "forward returns None: return the result"),
        (2, "def forward(x, g, b, e): print(x)", "prints its result and returns None"),
        (2, "def forward(x, g, b, e):\n    y = 1\n    return 1 / 0", "line 3 raises ZeroDivisionError: division by zero"),
        (3, "def backward(dy, x, g, e): return x", "backward returns Tensor; return 3 tensors"),
        (4, "class BatchNorm:\n    def __init__(self, *a): pass", "BatchNorm must be a class derived from nn.Module"),
        (7, "batches = lambda m, s: 5", "batches(0.1, 0.9) is 5; it must be 22"),
        (10, "from torch import nn\nModel = lambda: nn.BatchNorm1d(8)\ndef train(*a): pass\ndef predict(m, x): return x",
         "running statistics stay as they are"),
    ],
)  # fmt: skip
def test_what_is_no_misconception_is_told_in_a_line_too(number, code, told):
    result = judged(TASKS[number], namespace(code))
    assert result.state == "wrong"
    assert told in result.told
    assert "\n" not in result.told


def test_a_task_that_is_begun_is_not_wrong():
    assert judged(TASKS[1], namespace("MEAN = 1\nVARIANCE = ...")).state == "not done yet"
    assert judged(TASKS[1], namespace("MEAN = 1\nVARIANCE = 0.025\nNORMALIZED = [1, ...]")).state == "not done yet"


def test_a_file_is_checked_apart_from_this_process(tmp_path):
    files = {
        "exits.py": ("raise SystemExit", "leave out exit()"),
        "no_python.py": ("def forward(:", "line 1 is no Python"),
        "raises.py": ("\nimport gone", "line 2 raises ModuleNotFoundError"),
        "asks.py": ("def forward(*a): return input()", "EOFError"),
        "dies.py": ("import os\ndef forward(*a): os._exit(3)", "ended the process"),
        "loops.py": ("def forward(*a):\n    while True: pass", "a loop that does not end"),
        "fine.py": (TASKS[2].solution, ""),
        "latin.py": (b"forward = 'caf\xe9'", "no Python"),
    }
    for name, (code, _) in files.items():
        (tmp_path / name).write_bytes(code if isinstance(code, bytes) else code.encode())
    found = list(results([Job(tmp_path / name, 2) for name in files], seconds=2))
    for (_, told), result in zip(files.values(), found, strict=True):
        assert told in result.told
    assert [result.state for result in found].count("ok") == 1


def test_a_file_that_does_not_end_is_waited_for_once(tmp_path):
    (tmp_path / "loops.py").write_text("while True: pass")
    (tmp_path / "fine.py").write_text(TASKS[7].solution)
    jobs = [*(Job(tmp_path / "loops.py", number) for number in TASKS), Job(tmp_path / "fine.py", 7)]
    found = list(results(jobs, seconds=2))
    assert [result.number for result in found] == [*TASKS, 7]
    assert ["loop" in result.told for result in found] == [True] * 10 + [False]


def test_which_tasks_a_file_is_about(tmp_path):
    file = tmp_path / "02_mine.py"
    file.write_text("forward_images = fold = None\nclass BatchNorm: pass")
    assert tasks_of(file) == [2, 4, 5, 9]
    file.write_text("def (")
    assert tasks_of(file) == [2]


def call(*arguments):
    return CliRunner().invoke(commands, ["learn", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.mark.slow
def test_from_templates_to_everything_right(tmp_path):
    folder = tmp_path / "exercises"
    assert call("start", folder).exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == [task.file_name for task in TASKS.values()]
    again = call("start", folder)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert call("start", folder, "--force").exit_code == 0
    begun = call("check", folder)
    assert begun.exit_code == 1
    assert begun.output.count("not done yet") == 10
    assert "For a hint: batchnorm learn check" in begun.output
    for task in TASKS.values():
        (folder / task.file_name).write_text(task.solution)
    done = call("check", folder)
    assert (done.exit_code, done.output.count(" ok")) == (0, 10)
    assert "Everything is right." in done.output
    (folder / "07_momentum.py").write_text("def batches(m, s):\n    print('hello')\n    return 10")
    wrong = call("check", folder, "--task", 7, "--hint", "--hint")
    assert wrong.exit_code == 1
    for told in (
        "1 / momentum batches close only 63",
        "prints:\n  hello",
        "Hint 2 of 3 for task 7",
        "next hint: batchnorm",
    ):
        assert told in wrong.output
    assert call("check", folder / "07_momentum.py", "--hint", "--hint", "--hint").output.count("int 3 of 3") == 1


def test_one_file_for_all_tasks(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("\n".join(task.solution for task in TASKS.values()))
    done = call("check", file)
    assert (done.exit_code, done.output.count(" ok")) == (0, 10)


def test_chinese(tmp_path):
    assert call("start", tmp_path, "--lang", "zh").output.startswith("已写入 10 个文件")
    assert "手算四个数的前向" in (tmp_path / "01_four_numbers.py").read_text()
    file = tmp_path / "02_forward.py"
    file.write_text(TASKS[2].solution.replace("torch.sqrt(variance + eps)", "(variance + eps)"))
    found = CliRunner().invoke(
        commands, ["--lang", "zh", "learn", "check", str(file), "--hint"], env={"COLUMNS": "160"}
    )
    assert found.exit_code == 1
    for told in ("有误：除以了方差", "第 2 题的提示（1/3）", "下一条提示"):
        assert told in found.output


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("gone.py", (), "No such file"),
        ("empty.py", (), "say which it is with --task"),
        ("empty", (), "batchnorm learn start"),
        ("full", ("--task", 3), "03_backward.py"),
        ("full", ("--task", 11), "1<=x<=10"),
        ("full", ("--lang", "de"), "'de' is not one of"),
    ],
)
def test_bad_usage(tmp_path, name, arguments, told):
    (tmp_path / "empty.py").write_text("")
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "01_four_numbers.py").write_text("")
    done = call("check", tmp_path / name, *arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_the_option_counts_the_tasks():
    """It does without the tasks themselves, which need torch."""
    assert list(TASKS) == list(range(1, learn_exercises.TASKS + 1))


def test_in_a_notebook(capsys):
    exec(TASKS[7].template, globals_of_the_cell := {"check": check})
    exec("check(7)", globals_of_the_cell)
    exec(TASKS[7].solution.replace("math.ceil", "math.floor"), globals_of_the_cell)
    exec("check(7)", globals_of_the_cell)
    exec(TASKS[7].solution, globals_of_the_cell)
    exec("check(7)", globals_of_the_cell)
    assert capsys.readouterr().out == f"not done yet\nwrong: {why.ONE_BATCH_SHORT}\nok\n"
