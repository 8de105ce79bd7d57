"""Stand-ins for gcloud, xpk, sbatch, ssh and the like: shell scripts on the PATH that note how they are called."""

from pathlib import Path

# What a command line has to carry unharmed.
AWKWARD = [
    "--config",
    "lm",
    "--work-dir",
    "gs://bucket/my run",
    "--data.source",
    "text:it's/*.txt",
    '--x="$(id)" $HOME `a`; \\',
]

# Trains for as long as the first line of `codes-HOST` says: an exit code, or `run` for until it is stopped.
TRAINER = """\
codes="$FAKE/codes-$(basename "$HOME")"
code=$(head -n 1 "$codes" 2> /dev/null)
[ -n "$code" ] && sed -i 1d "$codes"
if [ "$code" = run ]; then
  trap 'exit 143' TERM
  while :; do sleep 0.05; done
fi
exit "${code:-0}"
"""

# Two workers. `lives` has a line for each TPU to be created: its states, look by look; the last one stays.
GCLOUD = """\
name=$5
look() {
  [ -s "$FAKE/$1" ] || { echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1; }
  head -n 1 "$FAKE/$1"
  [ "$(wc -l < "$FAKE/$1")" -gt 1 ] && sed -i 1d "$FAKE/$1"
  exit 0
}
forget() {
  for home in w0 w1; do
    kill -KILL "$(cat "$FAKE/$home/fam-jax-run/pid" 2> /dev/null)" 2> /dev/null
    rm -rf "${FAKE:?}/$home"
  done
}
case "$3 $4" in
  "tpu-vm describe") look node ;;
  "queued-resources describe") look request ;;
  "tpu-vm create" | "queued-resources create")
    [ -e "$FAKE/no-capacity" ] && { echo "ERROR: (gcloud) no more capacity" >&2; exit 1; }
    forget
    mkdir -p "$FAKE/w0" "$FAKE/w1"
    life=$(head -n 1 "$FAKE/lives" 2> /dev/null)
    [ -n "$life" ] && sed -i 1d "$FAKE/lives"
    printf '%s\\n' ${life:-READY} > "$FAKE/node"
    [ "$3" = tpu-vm ] || printf '%s\\n' WAITING_FOR_RESOURCES ACTIVE > "$FAKE/request" ;;
  "tpu-vm delete" | "queued-resources delete") forget; rm -f "$FAKE/node" "$FAKE/request" ;;
  "tpu-vm scp") for home in w0 w1; do cp "$5" "$FAKE/$home/"; done ;;
  "tpu-vm ssh")
    for word in "$@"; do case "$word" in --command=*) command=${word#--command=} ;; esac; done
    status=0
    for home in w0 w1; do ( export HOME="$FAKE/$home"; cd "$HOME" && bash -c "$command" ) || status=$?; done
    exit "$status" ;;
esac
"""

# Of a worker: `uv venv` makes a trainer instead of an environment.
PYTHON3 = """\
case "$*" in "-m uv venv"*)
  for folder in "$@"; do :; done
  mkdir -p "$folder/bin"
  cp "$FAKE/trainer" "$folder/bin/python" ;;
esac
"""

# Runs its last argument as the host before it would.
SSH = """\
while [ $# -gt 2 ]; do shift; done
mkdir -p "$FAKE/$1/fam-jax/.venv/bin"
cp "$FAKE/trainer" "$FAKE/$1/fam-jax/.venv/bin/python"
[ -e "$FAKE/unreachable-$1" ] && { echo "ssh: connect to host $1: No route to host" >&2; exit 255; }
export HOME="$FAKE/$1"
cd "$HOME" && exec sh -c "$2"
"""


class Fakes:
    """A folder of stand-ins and of what they keep.

    Attributes:
        folder: What they keep: states, codes to end with, homes of hosts.
    """

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        monkeypatch.setenv("FAKE", str(folder))
        monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
        self.add("trainer", TRAINER, folder / "trainer")

    def add(self, name: str, body: str = "", path: Path | None = None) -> None:
        """A program that notes its arguments, then does what `body` says."""
        path = path or self.folder / "bin" / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" END >> "$FAKE/calls"\n{body}')
        path.chmod(0o755)

    def write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def calls(self, program: str | None = None) -> list[list[str]]:
        """How programs were called, in order; of one of them, without its name."""
        path = self.folder / "calls"
        words = path.read_text().split("\0") if path.exists() else []
        calls: list[list[str]] = [[]]
        for word in words[:-1]:
            if word == "END":
                calls.append([])
            else:
                calls[-1].append(word)
        found = calls[:-1]
        return found if program is None else [call[1:] for call in found if call[0] == program]
