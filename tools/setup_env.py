"""Make ``.venv``: torch for this machine, triton, then this package, editable, with its dev extra.

torch is chosen here and not by pip, which would take the newest: with an NVIDIA driver the pair
that is tested on GPUs, without one the newest supported torch. A stamp keyed on all that decides
the result makes a second run return at once. Run by the Makefile; takes no arguments.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".setup-stamp"
LOG = VENV / "setup.log"

TORCH_WITH_DRIVER = "2.11.0"
TORCH_WITHOUT_DRIVER = "2.13.0"
# 3.7.1 has a reported bug on Hopper (illegal shared-memory reads with several dots in a kernel)
TRITON = "3.6.0"


def main() -> None:
    """Set up, or return at once if nothing that matters has changed."""
    driver = has_nvidia_driver()
    torch = TORCH_WITH_DRIVER if driver else TORCH_WITHOUT_DRIVER
    index = os.environ.get("TORCH_INDEX_URL", "")
    key = stamp_key(torch, index)
    if STAMP.exists() and STAMP.read_text() == key and runs(PYTHON):
        return
    print(f"setting up .venv with Python {sys.version.split()[0]}", flush=True)
    print(f"  an NVIDIA driver is {'present' if driver else 'absent'}: torch {torch}", flush=True)
    make_venv()
    constraint = VENV / "constraints.txt"
    constraint.write_text(f"torch=={torch}\n")
    from_index = ["--index-url", index] if index else []
    pip(f"torch {torch}", f"torch=={torch}", *from_index)
    pip(f"triton {TRITON}", "--no-deps", f"triton=={TRITON}")
    pip("build tools", "setuptools>=77", "wheel")
    # no isolation: the build tools are here already, and a build needs nothing else
    install = ["--no-build-isolation", "-c", str(constraint), "-e", f"{ROOT}[dev]"]
    pip("lfm2-gpu and its dev extra", *install)
    # a CUDA build of torch pins a triton of its own, which the line above may have brought back
    pip(f"triton {TRITON}, still", "--no-deps", f"triton=={TRITON}")
    STAMP.write_text(key)


def has_nvidia_driver() -> bool:
    """Whether this machine has a working NVIDIA driver."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    return subprocess.run([smi, "-L"], capture_output=True, timeout=60).returncode == 0


def stamp_key(torch: str, index: str) -> str:
    """A hash of what decides the environment: two files, the interpreter, torch and its index."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    for word in (str(ROOT), sys.version, torch, index):
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()


def runs(python: Path) -> bool:
    """Whether ``python`` starts and has the version of the interpreter that runs this file."""
    code = "import sys; print(sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return False
    return done.stdout.strip() == str(sys.version_info[:2])


def make_venv() -> None:
    """Create ``.venv``; one that does not start, or is another Python's, is replaced."""
    if runs(PYTHON):
        return
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        # Debian keeps venv in a package of its own, and says so on stdout
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def pip(what: str, *arguments: str) -> None:
    """``pip install`` with one line of progress, and pip's own words if it fails."""
    # most modules of torch and transformers are never imported: the others are compiled then
    options = ["--no-input", "--no-compile", "--disable-pip-version-check"]
    command = [str(PYTHON), "-m", "pip", "install", *options, *arguments]
    started = time.monotonic()
    print(f"  {what} ...", flush=True)
    with LOG.open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while True:
            try:
                code = child.wait(timeout=20)
                break
            except subprocess.TimeoutExpired:
                print(f"    {time.monotonic() - started:.0f} s", flush=True)
    if code != 0:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"{tail}\n{' '.join(command)} failed with exit code {code}")


if __name__ == "__main__":
    main()
