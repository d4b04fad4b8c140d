"""Maps import names to folders; everything else about the package stands in pyproject.toml."""

from setuptools import find_packages, setup

LAUNCH = ["megallama_launch"]

setup(
    packages=[*find_packages(include=["megallama", "megallama.*"]), *LAUNCH, "megallama_configs"],
    package_dir={
        "megallama_launch": "launch/megallama_launch",
        "megallama_configs": "configs",
    },
    package_data={
        "megallama.data": ["*.json"],
        "megallama_configs": ["models/*.yaml", "runs/*.yaml"],
    },
)
