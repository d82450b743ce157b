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

# Shared by the scripts of tools/: paths, progress lines with elapsed
# seconds, logs. To be sourced, never run.
#
#   WORK    everything that is installed or kept on this machine for the
#           project: venv, prefix (CRIU and crun), logs, the test cloud.
#           NOVA_PYCONTAINER_WORK moves it.
#   REPO    the clone that this file lies in.

set -euo pipefail

# With it set, every start of a command-line client compiles hundreds of
# modules again: 8 to 10 s in place of 3 s.
unset PYTHONDONTWRITEBYTECODE

LIB_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$LIB_DIR/../.." && pwd)
WORK=${NOVA_PYCONTAINER_WORK:-/var/tmp/nova-pycontainer}
VENV=$WORK/venv
PREFIX=$WORK/prefix
SYSTEM_PYTHON=${NOVA_PYCONTAINER_PYTHON:-/usr/bin/python3}
UV=$WORK/uv/bin/uv
LOGS=$WORK/logs
export WORK VENV PREFIX LOGS REPO
mkdir -p "$WORK" "$LOGS"
chmod 755 "$WORK"

: "${SETUP_T0:=$(date +%s)}"
export SETUP_T0

say() {
    printf '[%4ds] %s\n' "$(( $(date +%s) - SETUP_T0 ))" "$*"
}

die() {
    printf '[%4ds] ERROR: %s\n' "$(( $(date +%s) - SETUP_T0 ))" "$*" >&2
    exit 1
}

# logged NAME CMD...: runs CMD with its output in $LOGS/NAME.log; on failure
# shows the last lines and where the rest is.
logged() {
    local name=$1 rc=0
    shift
    "$@" >"$LOGS/$name.log" 2>&1 </dev/null || rc=$?
    if [ "$rc" -ne 0 ]; then
        tail -n 15 "$LOGS/$name.log" | sed 's/^/    /' >&2
        die "$name failed (exit code $rc): $*; log: $LOGS/$name.log"
    fi
}

need_root() {
    [ "$(id -u)" -eq 0 ] || die "this needs root: sudo $0"
}

# set_up_uv: how uv reaches the index, for whoever calls it. It does not read
# pip's configuration; a machine set up for pip works too.
set_up_uv() {
    local index
    export UV_CACHE_DIR=${UV_CACHE_DIR:-$WORK/cache/uv}
    export UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 UV_LINK_MODE=hardlink
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        index=${PIP_INDEX_URL:-$("$SYSTEM_PYTHON" -m pip config get \
            global.index-url 2>/dev/null || true)}
        [ -z "$index" ] || export UV_DEFAULT_INDEX=$index
    fi
    if [ -z "${SSL_CERT_FILE:-}" ] &&
            [ -r /etc/ssl/certs/ca-certificates.crt ]; then
        export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
    fi
}
