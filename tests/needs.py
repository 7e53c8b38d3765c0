"""What some tests need besides Python and a C++ compiler: where it is missing they are skipped, or fail.

Mark a test with `@pytest.mark.needs("libaio", "root")`, or call `require` in a fixture. With REQUIRE_ALL=yes in the
environment, as in CI, a missing one is a failure. At the end of a run, conftest.py lists what was skipped and what to
install for it.
"""

import functools
import os
import shlex
import shutil
import subprocess

import pytest

PACKAGES = {  # of Debian
    "ip": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "mpiexec": "mpich",
    "libaio": "libaio-dev",
}


def require(*names: str) -> None:
    """Skip the calling test where one of the names is missing; fail it where REQUIRE_ALL=yes."""
    if missing := [name for name in names if not find(name)]:
        packages = sorted({PACKAGES[name] for name in missing if name in PACKAGES})
        fix = f"apt-get install {' '.join(packages)}" if packages else "run the tests as root"
        reason = f"{', '.join(missing)} missing: {fix}"
        if os.environ.get("REQUIRE_ALL") == "yes":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@functools.cache
def find(name: str) -> str:
    """The path of a program, or another sign that the machine has it; "" where it does not."""
    if name == "root":
        return "root" if os.geteuid() == 0 else ""
    if name == "libaio":
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        line = [compiler, "-include", "libaio.h", "-x", "c++", "-fsyntax-only", os.devnull]
        has_compiler = shutil.which(compiler) is not None
        return "libaio.h" if has_compiler and subprocess.run(line, capture_output=True).returncode == 0 else ""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""
