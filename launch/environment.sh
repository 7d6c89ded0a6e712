# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with this package installed.
# PYTHON names the interpreter (3.11 or newer); the extras to install are the first argument.
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$PYTHON" --version) is too old: set PYTHON to a Python 3.11 or newer" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$1"
