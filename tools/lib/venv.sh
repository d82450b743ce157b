#!/bin/bash
# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

# The virtual environment with OpenStack, the test tools and this project.
#
#   venv.sh            make it, or do nothing when it is up to date
#   venv.sh --relock   resolve requirements.txt anew into constraints.txt
#
# NOVA_PYCONTAINER_DEV=1 installs the project editable; with 0 it is built from
# the clone and installed as users would have it. Unset leaves the mode as it
# is, and is 0 for a new environment.
#
# The interpreter is the system's own: nova-compute runs as an unprivileged
# user, who could not read an interpreter below someone's home directory.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CONSTRAINTS=$LIB_DIR/constraints.txt
UV_VERSION=0.13.9
set_up_uv

if [ ! -x "$UV" ]; then
    say "venv: installing uv"
    logged uv-venv "$SYSTEM_PYTHON" -m venv "$WORK/uv"
    logged uv-install "$WORK/uv/bin/pip" install -q "uv==$UV_VERSION"
fi

if [ "${1:-}" = --relock ]; then
    logged relock "$UV" pip compile --no-header --python "$SYSTEM_PYTHON" \
        --universal --python-version 3.11 --no-annotate \
        -o "$CONSTRAINTS" "$LIB_DIR/requirements.txt" \
        "$REPO/requirements.txt"
    say "venv: $(wc -l <"$CONSTRAINTS") versions in $CONSTRAINTS"
    exit 0
fi

if [ ! -x "$VENV/bin/python" ]; then
    say "venv: creating $VENV"
    logged venv "$UV" venv -q --python "$SYSTEM_PYTHON" "$VENV"
fi

# What the dependencies were installed from; equal means nothing to do.
stamp=$VENV/.requirements.sha256
want=$(cat "$LIB_DIR/requirements.txt" "$REPO/requirements.txt" \
    "$CONSTRAINTS" | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    say "venv: installing OpenStack and the test tools"
    logged venv-install "$UV" pip install -q --python "$VENV/bin/python" \
        -c "$CONSTRAINTS" -r "$LIB_DIR/requirements.txt" \
        -r "$REPO/requirements.txt"
    say "venv: compiling"
    # Unprivileged services cannot write .pyc files beside the sources.
    logged venv-compile "$VENV/bin/python" -m compileall -q -j 2 \
        "$VENV/lib" || true
    echo "$want" >"$stamp"
fi

# The project itself. Editable: once; entry points change with setup.cfg.
# Otherwise whenever a file of the clone that gets installed has changed.
project=$VENV/.project
if [ -z "${NOVA_PYCONTAINER_DEV:-}" ]; then
    case $(cat "$project" 2>/dev/null) in
        "editable $REPO "*) NOVA_PYCONTAINER_DEV=1 ;;
    esac
fi
if [ "${NOVA_PYCONTAINER_DEV:-0}" = 1 ]; then
    want="editable $REPO $(cat "$REPO/setup.cfg" "$REPO/setup.py" |
        sha256sum)"
else
    want="installed $(cd "$REPO" && find nova_pycontainer setup.cfg \
        setup.py pyproject.toml -type f ! -name '*.pyc' -print0 |
        sort -z | xargs -0 sha256sum | sha256sum)"
fi
# A clone without tags or without .git has no version for pbr to find.
export PBR_VERSION=${PBR_VERSION:-0.1.0}
if [ "$(cat "$project" 2>/dev/null)" != "$want" ]; then
    say "venv: installing the project (${want%% *})"
    if [ "${want%% *}" = editable ]; then
        logged venv-project "$UV" pip install -q --no-deps \
            --no-build-isolation --python "$VENV/bin/python" -e "$REPO"
    else
        logged venv-project "$UV" pip install -q --no-deps \
            --no-build-isolation --reinstall --python "$VENV/bin/python" \
            "$REPO"
    fi
    echo "$want" >"$project"
fi
say "venv: ready ($("$VENV/bin/python" -c \
    'import importlib.metadata as m; print("nova", m.version("nova"))'))"
