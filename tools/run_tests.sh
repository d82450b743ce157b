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

# Installs what the tests need, runs them, and looks whether they left
# anything behind on this machine.
#
#   tools/run_tests.sh [GROUP...] [-- STESTR-ARGUMENT...]
#
#   pep8        style checks (pre-commit) and types (mypy)
#   unit        no root, no kernel features
#   runtime     the container runtime alone: real containers; root
#   functional  Nova's own services in one process, with this driver; root
#   cloud       the OpenStack cloud of tools/cloud.sh, with a selection of
#               Tempest at the end; root
#
# All of them in this order if none is named. What follows "--" goes to
# stestr, for example a regular expression of tests. The last lines name every
# test that failed or was skipped, and the totals.
#
# A cloud that is up already is used and left up.

# shellcheck source=tools/lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

ALL=(pep8 unit runtime functional cloud)
groups=()
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    -h|--help) sed -n '14,31s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; arguments=("$@"); break ;;
    *)
        case " ${ALL[*]} " in
        *" $1 "*) groups+=("$1") ;;
        *) die "no group '$1'; there are: ${ALL[*]}" ;;
        esac ;;
    esac
    shift
done
[ ${#groups[@]} -gt 0 ] || groups=("${ALL[@]}")

need_root
cd "$REPO"
results=$LOGS/tests
rm -rf "$results"
mkdir -p "$results"
export LC_ALL=C.UTF-8 PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
export OS_NOVA_DISABLE_EVENTLET_PATCHING=true
export OS_STDOUT_CAPTURE=1 OS_STDERR_CAPTURE=1
export PATH=$VENV/bin:$PREFIX/bin:$PATH
export PRE_COMMIT_HOME=$WORK/cache/pre-commit

"$LIB_DIR/setup.sh"

# Before the first test and after the installation: what packages start is no
# test's doing.
"$REPO/tools/check_leaks" snapshot "$results/before.json"

cloud_is_up() { "$REPO/tools/cloud.sh" status >/dev/null 2>&1; }
cloud_was_up=
if cloud_is_up; then cloud_was_up=1; fi

# Whatever ends this script, no cloud of its own making goes on.
finish() {
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null || true
    if [ -n "${cloud_started:-}" ]; then
        cloud_started=
        "$REPO/tools/cloud.sh" down >>"$results/cloud-down.log" 2>&1 ||
            say "tools/cloud.sh down failed: see $results/cloud-down.log"
    fi
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

# stestr_group NAME CONCURRENCY LIMIT WRAPPER...: one stestr run of at most
# LIMIT seconds, its results kept as a subunit stream. What is in the array
# "selection" goes to stestr; "lane" names the results, if it is not NAME.
selection=()
stestr_group() {
    local name=$1 concurrency=$2 limit=$3 rc=0 results_of=${lane:-$1}
    shift 3
    local -a stestr=(stestr --test-path "./tests/$name" --top-dir "$REPO"
                     --repo-url "$results/$results_of.stestr")
    # It makes its repository only in a directory that exists.
    mkdir -p "$results/$results_of.stestr"
    timeout --kill-after=30 "$limit" "$@" "${stestr[@]}" run \
        --concurrency "$concurrency" "${selection[@]}" "${arguments[@]}" \
        </dev/null || rc=$?
    if [ "$rc" -eq 124 ] || [ "$rc" -eq 137 ]; then
        say "$results_of: not done after $limit s; the tests were stopped"
    fi
    "${stestr[@]}" last --subunit >"$results/$results_of.subunit" \
        2>"$results/$results_of.last.log" </dev/null || true
    if [ ! -s "$results/$results_of.subunit" ]; then
        say "$results_of: no results (stestr ended with $rc)"
        return 1
    fi
    return "$rc"
}

# check NAME COMMAND...: a check that counts as one test.
check() {
    local name=$1 rc=0
    shift
    "$@" </dev/null || rc=$?
    printf '%s %s\n' "$([ $rc -eq 0 ] && echo passed || echo failed)" \
        "$name" >>"$results/checks"
    return "$rc"
}

run_pep8() {
    local rc=0
    # pre-commit looks at what git knows; files of the test machine's root
    # may lie in a clone that belongs to somebody else.
    check pep8.pre-commit env GIT_CONFIG_COUNT=1 \
        GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0="$REPO" \
        pre-commit run --all-files --show-diff-on-failure || rc=1
    check pep8.mypy mypy || rc=1
    return "$rc"
}

run_unit() {
    stestr_group unit 2 900 env OS_TEST_TIMEOUT=160
}

# The tests' images are built outside, a test is no builder, and beside what
# needs none.
build_images() {
    local image
    for image in busybox debian12 debian13 sysvinit; do
        "$REPO/tools/images/build.sh" "$image" >/dev/null || return 1
    done
}

run_runtime() {
    wait "$images" || { cat "$results/images.log"; return 1; }
    local -a command=(env OS_TEST_TIMEOUT=600
                      PYTHON="$LIB_DIR/in-host.sh $VENV/bin/python")
    if [ ${#arguments[@]} -gt 0 ]; then
        stestr_group runtime 2 2100 "${command[@]}"
        return
    fi
    # These wait most of the time and leave the processors alone, so they run
    # beside the others, in namespaces of their own.
    local waiting='\.(test_migration_clocks|test_faults|test_upgrade)\.'
    local lane selection rc=0
    lane=waiting selection=("$waiting")
    stestr_group runtime 1 1200 "${command[@]}" \
        >"$results/waiting.log" 2>&1 &
    local beside=$!
    lane=runtime selection=(--exclude-regex "$waiting")
    stestr_group runtime 2 2100 "${command[@]}" || rc=1
    wait "$beside" || rc=1
    cat "$results/waiting.log"
    cat "$results/waiting.subunit" >>"$results/runtime.subunit" || rc=1
    return "$rc"
}

run_functional() {
    # Each worker of stestr has namespaces of its own: Nova's fixtures give
    # all ports the same ids.
    stestr_group functional 2 1800 env OS_TEST_TIMEOUT=600 \
        PYTHON="$LIB_DIR/in-host.sh $VENV/bin/python"
}

run_cloud() {
    if ! cloud_is_up; then
        cloud_started=1
        "$REPO/tools/cloud.sh" up || return 1
    fi
    local rc=0
    stestr_group cloud 1 2200 env OS_TEST_TIMEOUT=900 || rc=1
    if [ ${#arguments[@]} -eq 0 ]; then
        # Tempest's results are the group's.
        timeout --kill-after=30 900 "$REPO/tools/tempest.sh" || rc=1
        cat "$LOGS/tempest.subunit" >>"$results/cloud.subunit" || rc=1
    fi
    return "$rc"
}

case " ${groups[*]} " in *' runtime '*)
    build_images >"$results/images.log" 2>&1 &
    images=$!
esac
failed=()
for group in "${groups[@]}"; do
    say "== $group"
    begin=$(date +%s)
    if "run_$group"; then
        say "== $group: passed ($(( $(date +%s) - begin )) s)"
    else
        say "== $group: FAILED ($(( $(date +%s) - begin )) s)"
        failed+=("$group")
    fi
done
finish

say "== leaks"
leaks_rc=0
check leaks "$REPO/tools/check_leaks" compare "$results/before.json" ||
    leaks_rc=1
if [ $leaks_rc -ne 0 ]; then
    failed+=(leaks)
    [ -z "$cloud_was_up" ] || say "the cloud was up before and went on" \
        "living meanwhile; some of this may be its own"
fi

rc=0
if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: ${failed[*]}; results and logs: $LOGS"
    rc=1
fi
totals=("$results" "${groups[@]}")
if [ "${groups[*]}" = "${ALL[*]}" ] && [ ${#arguments[@]} -eq 0 ]; then
    totals+=(--matrix "$REPO/doc/source/support-matrix.ini")
fi
# The totals are the last line.
python3 "$REPO/tools/test_totals.py" "${totals[@]}" || rc=1
exit $rc
