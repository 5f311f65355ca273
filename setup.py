"""Build script: the C++ and CUDA extensions are declared here, everything else is in pyproject.toml."""

import setuptools

setuptools.setup()
