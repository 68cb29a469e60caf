"""Shim for tools that run ``setup.py``; everything is declared in ``pyproject.toml``."""

from setuptools import setup

setup()
