"""Code for bash on the workers of a TPU VM: installing, starting, looking, stopping. All paths are in the home folder.

The process that trains has its process id in `fam-jax-run/pid`, what it prints in `fam-jax-run/log` and, when it has
ended, its exit code in `fam-jax-run/status`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from experiments.launch.common import train_command

BUNDLE = "fam-jax.bundle"
MARK = "training: "  # before what `STATUS` has to tell
PYTHON_VERSION = "3.12"  # the TPU images' own Python is older than the packages allow

_ALIVE = 'kill -0 "$(cat ~/fam-jax-run/pid 2> /dev/null)" 2> /dev/null'
_REFUSE = f"if {_ALIVE}; then echo 'training is running here; stop it first' >&2; exit 1; fi"

INSTALL = f"""\
set -e
{_REFUSE}
rm -rf ~/fam-jax
git -c advice.detachedHead=false clone --quiet ~/{BUNDLE} ~/fam-jax
cd ~/fam-jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python {PYTHON_VERSION} ~/fam-jax-venv
python3 -m uv pip install --quiet --python ~/fam-jax-venv/bin/python -e '.[tpu]'
echo "installed $(git rev-parse --short HEAD) on $(hostname)"
"""

STATUS = f"""\
cd ~/fam-jax-run 2> /dev/null || {{ echo '{MARK}none'; exit; }}
if [ -s status ]; then echo "{MARK}$(cat status) on $(hostname)"
elif {_ALIVE}; then echo "{MARK}running on $(hostname)"
elif [ -s pid ]; then echo "{MARK}lost on $(hostname)"
else echo "{MARK}none on $(hostname)"; fi
"""

STOP = f"""\
{_ALIVE} || {{ echo "nothing is running on $(hostname)"; exit; }}
kill -TERM "$(cat ~/fam-jax-run/pid)"
for second in $(seq 300); do {_ALIVE} || break; sleep 1; done
sleep 1
{STATUS}"""


def start(training: Sequence[str]) -> str:
    """Starts training in the background; it outlives the connection."""
    # The shell around it only notes its id and its exit code. SIGTERM goes to Python alone, so that the shell stays.
    inner = (
        f"{train_command('~/fam-jax-venv/bin/python', training)} &\n"
        "echo $! > ~/fam-jax-run/pid\nwait $!\necho $? > ~/fam-jax-run/status"
    )
    return f"""\
{_REFUSE}
if [ ! -x ~/fam-jax-venv/bin/python ]; then echo 'nothing is installed here; use install first' >&2; exit 1; fi
cd ~/fam-jax || exit 1
mkdir -p ~/fam-jax-run
rm -f ~/fam-jax-run/pid ~/fam-jax-run/status
setsid nohup bash -c {shlex.quote(inner)} >> ~/fam-jax-run/log 2>&1 < /dev/null &
while [ ! -s ~/fam-jax-run/pid ]; do sleep 0.1; done
echo "started on $(hostname)"
"""


def logs(lines: int, follow: bool) -> str:
    """Prints the log's last lines, each after the worker's name."""
    return f'tail -n {lines}{" -F" if follow else ""} ~/fam-jax-run/log | sed -u "s/^/$(hostname): /"'
