# Sourced by tools/demo and tools/check, from the project's root: makes .venv with the locked versions, once.
# Usage: environment EXTRAS, as in `environment [dev]`.

environment() {
    local python
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        python=
    done
    if [ -z "$python" ]; then
        echo "Error: no Python of 3.11 or newer was found; install one and run this again" >&2
        exit 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # The stamp says that this very lock, project file and set of extras are installed.
    local stamp
    stamp=".venv/installed-$(cat requirements.lock pyproject.toml | cksum | tr ' ' '-')-$1"
    if [ ! -e "$stamp" ]; then
        echo "installing into .venv"
        .venv/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".$1"
        touch "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
}
