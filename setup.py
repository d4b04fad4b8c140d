"""Maps import names to folders; everything else about the package stands in pyproject.toml."""

from setuptools import find_packages, setup

OUTSIDE = ["megallama_launch", "megallama_kernels"]

setup(
    packages=[*find_packages(include=["megallama", "megallama.*"]), *OUTSIDE, "megallama_configs"],
    package_dir={
        "megallama_launch": "launch/megallama_launch",
        "megallama_kernels": "kernels/megallama_kernels",
        "megallama_configs": "configs",
    },
    package_data={
        "megallama.data": ["*.json"],
        "megallama_configs": ["models/*.yaml", "runs/*.yaml"],
    },
)
