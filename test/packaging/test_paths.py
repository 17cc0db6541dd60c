"""Configuration is found from a checkout and from an installed prefix, and its absence is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.paths import PACKAGE, config_dir, find_share_dir, share_dir


def make_package(folder: Path) -> Path:
    package = folder / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return package


def test_the_checkout_is_its_own_share() -> None:
    assert (share_dir() / "package.xml").is_file()
    assert config_dir() == share_dir() / "config"
    assert (config_dir() / "dds" / "fastdds.xml").is_file()


def test_a_checkout_reached_through_a_link_is_found(tmp_path: Path) -> None:
    """`colcon build --symlink-install` imports the package through a link in the build folder."""
    checkout = tmp_path / "src"
    package = make_package(checkout)
    (checkout / "config").mkdir()
    (checkout / "package.xml").touch()
    build = tmp_path / "build"
    build.mkdir()
    (build / PACKAGE).symlink_to(package)
    assert find_share_dir(build / PACKAGE) == checkout.resolve()


@pytest.mark.parametrize("libdir", ["lib/python3.11/site-packages", "local/lib/python3.10/dist-packages"])
def test_an_installation_finds_share_above_site_packages(tmp_path: Path, libdir: str) -> None:
    package = make_package(tmp_path / "opt" / libdir)
    prefix = tmp_path / "opt" / ("local" if libdir.startswith("local") else "")
    share = prefix / "share" / PACKAGE
    (share / "config").mkdir(parents=True)
    assert find_share_dir(package) == share


def test_the_nearest_prefix_wins_over_one_further_up(tmp_path: Path) -> None:
    package = make_package(tmp_path / "overlay" / "lib" / "python3.12" / "site-packages")
    near = tmp_path / "overlay" / "share" / PACKAGE
    for share in (near, tmp_path / "share" / PACKAGE):
        (share / "config").mkdir(parents=True)
    assert find_share_dir(package) == near


def test_a_config_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    """A `config/` beside the package without our `package.xml` (site-packages/config exists) is not ours."""
    package = make_package(tmp_path / "site-packages")
    (tmp_path / "site-packages" / "config").mkdir()
    with pytest.raises(UserError) as caught:
        find_share_dir(package)
    assert str(package) in str(caught.value)
    assert "install the package again" in str(caught.value)
