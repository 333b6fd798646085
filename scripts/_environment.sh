# Sourced by the scripts beside it: goes to the root of the repository, and gives `install EXTRAS STAMP...`.
# shellcheck shell=bash
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONDONTWRITEBYTECODE # each of many processes would compile torch, transformers and peft anew: 20 s

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# The first Python that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, got $(python3 --version 2>&1 || true); set PYTHON to name one."
}

make_environment() {
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python)
    echo "Making .venv with $("$python" --version) ..."
    "$python" -m venv .venv || fail "$python could not make .venv; does it lack the venv module (python3-venv)?"
}

# What an installation depends on: if it is the same as at the last one, there is nothing to do.
fingerprint() {
    { cat pyproject.toml; pwd; .venv/bin/python --version; } | .venv/bin/python -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# install NAME EXTRAS: installs the package, editable, unless NAME or `dev` (which has it all) is up to date.
install() {
    make_environment
    local current name
    current=$(fingerprint)
    for name in "$1" dev; do
        [ "$(cat ".venv/.installed-$name" 2>/dev/null || true)" = "$current" ] && return
    done
    echo "Installing bayes_kf$2 into .venv (some minutes the first time) ..."
    # Python compiles what it imports; to compile all that comes with the libraries would take a minute.
    .venv/bin/python -m pip install --quiet --no-compile -e ".$2" || fail "the installation failed; see above."
    echo "$current" >".venv/.installed-$1"
}

# The tests of the report page drive Chromium; where there is none, and none can be installed, they skip.
install_browser() {
    local name
    for name in "${BAYES_KF_CHROMIUM:-chromium}" chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "Installing Chromium for the tests of the report page ..."
        local get=(timeout 200 apt-get -qq -y --no-install-recommends install chromium)
        export DEBIAN_FRONTEND=noninteractive
        { "${get[@]}" || { timeout 60 apt-get -qq update && "${get[@]}"; }; } >/dev/null 2>&1 && return
    fi
    echo "No Chromium: the tests that open the report page in a browser will skip."
}
