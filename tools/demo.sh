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

# From nothing to a login in a container that OpenStack runs, and back:
#
#   tools/demo.sh [--json PATH] [--keep] [--image NAME]
#
#   --json PATH   write the timings there, too
#   --keep        leave the cloud and the instance up, and say how to use them
#   --image NAME  another image of tools/images (debian13)
#
# It installs what is missing, brings the test cloud up (two compute hosts on
# this machine, see doc/source/contributor/cloud.rst), builds an image, boots
# an instance with the command-line client as any user would, logs in through
# a floating IP, looks at it from inside and from its host, live-migrates it to
# the other host and back, and removes all of it again. It runs on Debian 12 and 13, as root.

# shellcheck source=tools/lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

json='' keep='' image=debian13
while [ $# -gt 0 ]; do
    case $1 in
    --json) [ $# -ge 2 ] || die "--json needs a path"; json=$2; shift ;;
    --keep) keep=1 ;;
    --image) [ $# -ge 2 ] || die "--image needs a name"; image=$2; shift ;;
    -h|--help) sed -n '14,28s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown argument $1; see --help" ;;
    esac
    shift
done
case $image in
debian12|debian13|sysvinit) login=debian ;;
*) die "the demo logs in by ssh, which image $image has not" ;;
esac

need_root
name=demo-$(date +%H%M%S)
scratch=$(mktemp -d)
results=$scratch/results
: >"$results"
step='starting'
cloud_started='' in_cloud=''

now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }'; }
# result KEY VALUE: for the table and --json
result() { echo "$1 $2" >>"$results"; }

title() {
    step=$1
    printf '\n'
    say "=== $1"
}

# openstack ARGUMENT...: shows the command as a user types it, and runs it.
openstack() {
    printf '\n$ openstack %s\n' "$*"
    command openstack "$@"
}

# quietly COMMAND...: neither fails nor says anything
quietly() { "$@" >/dev/null 2>&1 || true; }

clean_up() {
    local rc=$?
    trap - EXIT
    trap '' INT TERM HUP
    # Whatever fails here, the rest has to be cleaned up.
    set +e
    if [ $rc -ne 0 ]; then
        {
            printf '\n'
            say "THE DEMO FAILED while: $step (exit code $rc)"
            if [ -n "$in_cloud" ]; then
                command openstack server show "$name" -c status -c fault \
                    2>/dev/null
            fi
            echo "Logs of the cloud's services: $LOGS/cloud" \
                "(host1.nova-compute.log, host1.agent.log, ...);" \
                "of the installation: $LOGS"
        } >&2
    fi
    if [ -n "$in_cloud" ] && { [ -z "$keep" ] || [ $rc -ne 0 ]; }; then
        # It may have been the administrator's turn.
        eval "$("$REPO/tools/cloud.sh" openrc demo)"
        quietly command openstack server delete --wait "$name"
        quietly command openstack floating ip delete "$address"
        quietly command openstack port delete "$name"
        quietly command openstack security group delete "$name"
        quietly command openstack keypair delete "$name"
        quietly command openstack image delete "$name"
    fi
    if [ -n "$cloud_started" ] && { [ -z "$keep" ] || [ $rc -ne 0 ]; }; then
        say "taking the cloud down"
        "$REPO/tools/cloud.sh" down || rc=1
    fi
    if [ -z "$keep" ] || [ $rc -ne 0 ]; then
        rm -rf "$scratch"
    fi
    exit "$rc"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

title 'installing what is missing'
begin=$(now)
"$LIB_DIR/setup.sh"
result install_s "$(since "$begin")"
export PATH=$VENV/bin:$PATH PYTHONWARNINGS=ignore

title "building the image ($image, from Debian's packages)"
begin=$(now)
"$REPO/tools/images/build.sh" "$image" "$scratch/$image.tar.zst"
result image_build_s "$(since "$begin")"

# Before the cloud is up: its own memory comes and goes.
title 'what an idle instance costs its host in memory (10 of them, no cloud)'
(cd "$REPO" && python -m tests.benchmarks.density --instances 10 \
    --image "$image" --json "$scratch/density.json")

title 'bringing the cloud up'
if "$REPO/tools/cloud.sh" status >/dev/null 2>&1; then
    say 'it was up already, and will be left up'
else
    cloud_started=1
fi
begin=$(now)
"$REPO/tools/cloud.sh" up
result cloud_up_s "$(since "$begin")"
eval "$("$REPO/tools/cloud.sh" openrc demo)"
address=''
in_cloud=1
openstack network list -c Name -c Subnets
openstack flavor list -c Name -c RAM -c Disk -c VCPUs

title 'uploading the image'
begin=$(now)
openstack image create --disk-format raw --container-format bare \
    --file "$scratch/$image.tar.zst" -c name -c size -c status "$name"
result image_upload_s "$(since "$begin")"

title 'a key pair, a security group and a port with a floating IP'
openstack keypair create --private-key "$scratch/key" -c name -c type "$name"
chmod 600 "$scratch/key"
openstack security group create -c name "$name"
openstack security group rule create --protocol icmp -c protocol "$name"
openstack security group rule create --protocol tcp --dst-port 22 \
    -c protocol -c port_range_min "$name"
openstack security group rule create --protocol tcp --dst-port 7 \
    -c protocol -c port_range_min "$name"
openstack port create --network private --security-group "$name" \
    -c fixed_ips -c mac_address -c status "$name"
openstack floating ip create --port "$name" -c floating_ip_address public
address=$(command openstack floating ip list --port "$name" -f value \
    -c 'Floating IP Address')
[ -n "$address" ] || die "port $name has no floating IP"

title 'booting the instance'
begin=$(now)
openstack server create --image "$name" --flavor pyc.small \
    --key-name "$name" --port "$name" -c id -c status "$name"
result create_command_s "$(since "$begin")"
python "$REPO/tools/demo/wait_server.py" "$name" ACTIVE 300
active=$(now)
result create_to_active_s "$(since "$begin")"
openstack server show -c name -c status -c addresses -c image -c key_name \
    -c OS-EXT-STS:power_state "$name"

title 'logging in'
remote=(ssh -i "$scratch/key" -o BatchMode=yes -o ConnectTimeout=3
        -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null
        -o LogLevel=ERROR "$login@$address")
say "${remote[*]}"
until "${remote[@]}" true 2>"$scratch/ssh.log"; do
    # The instance's own first boot is part of this.
    if awk -v a="$active" -v b="$(now)" 'BEGIN { exit !(b - a > 240) }'; then
        cat "$scratch/ssh.log" >&2
        command openstack console log show --lines 40 "$name" >&2 || true
        die "no login at $login@$address within 240 s"
    fi
    sleep 0.2
done
result active_to_ssh_s "$(since "$active")"

title 'what the guest sees of itself'
"${remote[@]}" bash -s <"$REPO/tools/demo/guest.sh"

title 'its console'
openstack console log show --lines 12 "$name" | cut -c 1-100

title 'what its host sees'
id=$(command openstack server show -f value -c id "$name")
eval "$("$REPO/tools/cloud.sh" openrc admin)"
host=$(command openstack server show -f value -c OS-EXT-SRV-ATTR:host "$id")
eval "$("$REPO/tools/cloud.sh" openrc demo)"
say "$host"
"$REPO/tools/cloud.sh" run "$host" env PYTHONPATH="$REPO" "$VENV/bin/python" \
    "$REPO/tools/demo/host.py" "$id" "$scratch/host"
cat "$scratch/host" >>"$results"

title 'moving it to the other host and back, under a TCP stream and a ping'
env PYTHONPATH="$REPO" python -c 'from tests import echo; print(echo.SERVICE)' |
    "${remote[@]}" 'cat > /tmp/echo-service; sudo setsid python3 \
        /tmp/echo-service </dev/null >/dev/null 2>&1 &'
eval "$("$REPO/tools/cloud.sh" openrc admin)"
env PYTHONPATH="$REPO" python "$REPO/tools/demo/migrate.py" "$id" "$address" \
    "$scratch/migrations.json" 4
eval "$("$REPO/tools/cloud.sh" openrc demo)"
guest=$("${remote[@]}" hostname) || die 'no login after the moves'
say "and a login works as before: $guest"

if [ -n "$keep" ]; then
    python "$REPO/tools/demo/report.py" "$results" "$scratch/density.json" \
        "$scratch/migrations.json" "$json"
    cat <<TEXT

The instance is up. To use it and the cloud:

  ${remote[*]}
  eval "\$(tools/cloud.sh openrc demo)"
  PATH=$VENV/bin:\$PATH
  openstack server list
  tools/cloud.sh run $host pycontainer list
  tools/cloud.sh down [--purge]
TEXT
    exit 0
fi

title 'deleting the instance'
begin=$(now)
openstack server delete "$name"
python "$REPO/tools/demo/wait_server.py" "$name" gone 120
result delete_s "$(since "$begin")"

title 'cleaning up'
openstack floating ip delete "$address"
# A port that was made by the user stays when its server goes.
openstack port delete "$name"
openstack security group delete "$name"
openstack keypair delete "$name"
openstack image delete "$name"
in_cloud=''

title 'how long it took'
python "$REPO/tools/demo/report.py" "$results" "$scratch/density.json" \
    "$scratch/migrations.json" "$json"
step='taking the cloud down'
