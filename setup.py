"""Everything about the package stands in pyproject.toml. This file is here because the layout of the project asks for one."""

from setuptools import setup

setup()
