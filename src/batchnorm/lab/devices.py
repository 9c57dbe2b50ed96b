"""Where experiments can run."""

from batchnorm.errors import InputError
from batchnorm.lab.experiment import Setting


def require_cpu(setting: Setting) -> None:
    """
    Refuse another device, for experiments that do not move their data to one.

    Raises:
        InputError: the setting asks for another.
    """
    if setting.device != "cpu":
        raise InputError(f"this experiment runs on the CPU only, but --device says {setting.device}: leave it out")
