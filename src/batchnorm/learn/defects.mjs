// The layer of the tutorial's section 5, with its defects: each can be mended alone. The text is Python that runs; tests run it.

// In the order of the listing.
export const DEFECTS = ["momentum", "buffers", "axes", "single", "detach", "unbiased", "bias", "eval"];

// What the comment on momentum says, for a reader of English; the panel passes its own.
export const COMMENTS = { broken: "larger = slower updates, smoother", mended: "weight of the new batch: larger = faster updates" };

// The lines of the listing: { text, defects } with the defects that a line shows or, mended, has had. `mended` is a set of their names.
export function listing(mended, comments = COMMENTS) {
  const lines = [];
  const has = (defect) => mended.has(defect);
  const add = (text, ...defects) => lines.push({ text, defects });
  const either = (defect, broken, whole) => [broken, whole][Number(has(defect))];

  add("import torch");
  add("import torch.nn as nn");
  add("");
  add("class BatchNorm(nn.Module):");
  add("    def __init__(self, num_features, eps=1e-5, momentum=0.1):");
  add("        super().__init__()");
  add("        self.num_features = num_features");
  add("        self.eps = eps");
  add(`        self.momentum = momentum  # ${either("momentum", comments.broken, comments.mended)}`, "momentum");
  add("        self.gamma = nn.Parameter(torch.ones(num_features))");
  add("        self.beta = nn.Parameter(torch.zeros(num_features))");
  for (const [name, value] of [["running_mean", "torch.zeros(num_features)"], ["running_var", "torch.ones(num_features)"]]) {
    add(either("buffers", `        self.${name} = ${value}`, `        self.register_buffer("${name}", ${value})`), "buffers");
  }
  add("");
  add("    def forward(self, x):");
  if (has("axes")) {
    add("        dims = [0, *range(2, x.dim())]  # all but the channels", "axes");
    add("        shape = [1, -1] + [1] * (x.dim() - 2)", "axes");
  }
  const dims = either("axes", "dim=0", "dim=dims");
  const shaped = (name) => (has("axes") ? `${name}.view(shape)` : name);
  add("        if self.training:");
  if (has("single") || has("unbiased")) add("            m = x.numel() // self.num_features  # values per channel", ...["single", "unbiased"].filter(has));
  if (has("single")) {
    add("            if m == 1:", "single");
    add('                raise ValueError("one value per channel has no variance: train with more")', "single");
  }
  add(`            mean = torch.mean(x, ${dims})`, ...(has("axes") ? ["axes"] : []));
  add(`            var = torch.var(x, ${dims}, unbiased=False)`, ...(has("axes") ? ["axes"] : []));
  const detached = (name) => (has("detach") ? `${name}.detach()` : name);
  const variance = has("unbiased") ? `${detached("var")} * m / (m - 1)` : detached("var");
  add("            old, new = 1 - self.momentum, self.momentum");
  add(`            self.running_mean = old * self.running_mean + new * ${detached("mean")}`, "detach");
  add(`            self.running_var = old * self.running_var + new * ${variance}`, "detach", "unbiased");
  add("        else:");
  add("            mean, var = self.running_mean, self.running_var");
  add(`        x_hat = (x - ${shaped("mean")}) / torch.sqrt(${shaped("var")} + self.eps)`, "axes");
  add(`        return ${shaped("self.gamma")} * x_hat + ${shaped("self.beta")}`, "axes");
  add("");
  const linear = (inputs, outputs) => either("bias", `    nn.Linear(${inputs}, ${outputs}),`, `    nn.Linear(${inputs}, ${outputs}, bias=False),`);
  add("model = nn.Sequential(");
  add(linear(784, 512), "bias");
  add("    BatchNorm(512),");
  add("    nn.ReLU(),");
  add(linear(512, 256), "bias");
  add("    BatchNorm(256),");
  add("    nn.ReLU(),");
  add("    nn.Linear(256, 10),");
  add(")");
  add("");
  add("@torch.no_grad()");
  add("def predict(x):", "eval");
  if (has("eval")) add("    model.eval()", "eval");
  add("    return model(x)", ...(has("eval") ? [] : ["eval"]));
  return lines;
}

export const source = (mended) => listing(mended).map(({ text }) => `${text}\n`).join("");

// What is tried, and the defects on which its outcome depends. Recorded outcomes are by the mended ones of these, joined by "-".
export const TRIALS = {
  state_dict: ["buffers"],
  double: ["buffers"],
  memory: ["detach"],
  deepcopy: ["detach"],
  second_backward: ["detach"],
  single: ["single", "unbiased"],
  variance: ["unbiased"],
  images: ["axes"],
  square_images: ["axes"],
  momentum: ["momentum"],
  neighbors: ["eval"],
  dead_bias: ["bias"],
};

// The name of the outcome of a trial: "" if nothing that matters is mended.
export const outcome = (trial, mended) => TRIALS[trial].filter((defect) => mended.has(defect)).join("-");
