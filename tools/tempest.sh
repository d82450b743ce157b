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

# Runs Tempest on the two-host cloud of tools/cloud.sh, with ssh into guests.
#
#   tools/tempest.sh [--all | --list] [ARGUMENT-OF-TEMPEST-RUN...]
#
# Without --all: a short selection, tools/tempest/short.txt. Whatever
# is excluded, and why, is in tools/tempest/exclude.txt. What follows goes to
# "tempest run", such as "--regex test_pause".
#
# A cloud that is up already is used and left up.

# shellcheck source=tools/lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

VERSION=47.0.0
TEMPEST=$WORK/tempest
selection=(--include-list "$REPO/tools/tempest/short.txt")
case ${1:-} in
-h|--help) sed -n '14,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
--all) shift; selection=(--regex
    '^tempest\.(api\.compute|scenario)\.') ;;
--list) shift; selection=(--list-tests) ;;
esac
# What is asked for by name is not also looked for in a list.
case " $* " in *" --regex "*|*" -r "*) selection=() ;; esac

need_root
"$LIB_DIR/setup.sh"
set_up_uv
if [ "$(cat "$TEMPEST/version" 2>/dev/null)" != "$VERSION" ]; then
    say "tempest: installing $VERSION"
    logged tempest-venv "$UV" venv -q --clear \
        --python "$SYSTEM_PYTHON" "$TEMPEST/venv"
    logged tempest-install "$UV" pip install -q \
        --python "$TEMPEST/venv/bin/python" "tempest==$VERSION"
    echo "$VERSION" >"$TEMPEST/version"
fi
"$REPO/tools/images/build.sh" debian13 >/dev/null
started=
if ! "$REPO/tools/cloud.sh" status >/dev/null 2>&1; then
    started=1
    "$REPO/tools/cloud.sh" up
fi
finish() {
    [ -z "$started" ] || "$REPO/tools/cloud.sh" down >/dev/null
}
trap finish EXIT

rm -rf "$TEMPEST/workspace" "$TEMPEST/workspaces.yaml"
logged tempest-init "$TEMPEST/venv/bin/tempest" init --name pycontainer \
    --workspace-path "$TEMPEST/workspaces.yaml" "$TEMPEST/workspace"
PYTHONPATH=$REPO/tools:$REPO PYTHONWARNINGS=ignore \
    "$VENV/bin/python" "$REPO/tools/tempest/configure.py" \
    >"$TEMPEST/workspace/etc/tempest.conf"
say "tempest: configured; $TEMPEST/workspace/etc/tempest.conf"
cd "$TEMPEST/workspace"
rc=0
"$TEMPEST/venv/bin/tempest" run --concurrency 1 \
    --exclude-list "$REPO/tools/tempest/exclude.txt" \
    "${selection[@]}" "$@" </dev/null || rc=$?
"$TEMPEST/venv/bin/stestr" last --subunit >"$LOGS/tempest.subunit" \
    2>/dev/null </dev/null || true
say "tempest: ended with $rc; its log: $TEMPEST/workspace/logs"
exit "$rc"
