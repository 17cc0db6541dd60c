"""Where the files that travel beside the code are: in a checkout, or in an installed `share/` folder."""

from __future__ import annotations

from pathlib import Path

from kuavo_smolvla_ros.errors import UserError

PACKAGE = "kuavo_smolvla_ros"


def find_share_dir(package_dir: Path) -> Path:
    """The folder that holds `config/` and `launch/` for the package whose code lies in `package_dir`.

    A checkout (or editable install, or colcon build with symbolic links) holds them beside the package;
    an installation holds them in `PREFIX/share/kuavo_smolvla_ros`, PREFIX being above `site-packages`.
    """
    checkout = package_dir.resolve().parent
    if (checkout / "package.xml").is_file() and (checkout / "config").is_dir():
        return checkout
    for prefix in package_dir.absolute().parents:
        share = prefix / "share" / PACKAGE
        if (share / "config").is_dir():
            return share
    raise UserError(
        f"the configuration files of {PACKAGE} were found neither in {checkout} nor in a share/{PACKAGE} "
        f"folder above {package_dir}; install the package again (make setup, or colcon build)"
    )


def share_dir() -> Path:
    """The folder that holds `config/` and `launch/` of the running package."""
    return find_share_dir(Path(__file__).parent)


def config_dir() -> Path:
    """The shipped configuration: `robot/`, `policy/`, `dds/`, `deploy/`."""
    return share_dir() / "config"
