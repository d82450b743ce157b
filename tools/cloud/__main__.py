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

"""The command line of tools/cloud.sh."""

import argparse
import fcntl
import importlib.util
import os
import sys
import time
import traceback

import prettytable

from cloud import down
from cloud import graph
from cloud import hosts
from cloud import layout
from cloud import power
from cloud import process
from cloud import up


def _lock():
    """One at a time may change the cloud."""
    layout.CLOUD.mkdir(parents=True, exist_ok=True)
    lock = open(layout.WORK / 'cloud.lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        graph.say('waiting for another tools/cloud.sh to end')
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _rss(pid: int) -> int:
    """Resident memory of a session's processes, in MiB."""
    total = 0
    for member in process.session_members(pid):
        try:
            with open(f'/proc/{member}/status') as status:
                for line in status:
                    if line.startswith('VmRSS:'):
                        total += int(line.split()[1])
        except OSError:
            pass
    return total // 1024


def status() -> int:
    records = process.records()
    if not records:
        print('the cloud is down')
        return 3
    table = prettytable.PrettyTable(
        ['service', 'host', 'state', 'pid', 'up (s)', 'memory (MiB)'])
    table.align = 'l'
    dead = 0
    for record in records:
        if record.alive:
            table.add_row([record.name, record.host, 'running', record.pid,
                           int(time.time() - record.at), _rss(record.pid)])
        else:
            dead += 1
            table.add_row([record.name, record.host, 'DEAD', '', '', ''])
    print(table)
    print(f'driver: {up.settings().get("driver")}; logs: {layout.LOGS}')
    if dead or not up.READY.exists():
        print(f'incomplete: {dead} services are dead' if dead
              else 'incomplete: not (yet) ready')
        return 1
    return 0


def enter(host: str, command: list[str]) -> None:
    """Becomes the command, inside the host."""
    argv = hosts.enter(host, command or ['bash'])
    os.environ['PATH'] = (f'{layout.VENV}/bin:{layout.PREFIX}/bin:'
                          '/usr/local/sbin:/usr/local/bin:/usr/sbin:'
                          '/usr/bin:/sbin:/bin')
    os.execvp(argv[0], argv)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='tools/cloud.sh', description='An OpenStack cloud with two '
        'compute hosts on this machine.')
    commands = parser.add_subparsers(dest='command', required=True)
    sub = commands.add_parser('up', help='bring it up, or complete it')
    sub.add_argument('--driver', choices=('pycontainer', 'fake'),
                     default=os.environ.get('NOVA_PYCONTAINER_CLOUD_DRIVER',
                                            'pycontainer'),
                     help='what the compute hosts run')
    sub = commands.add_parser('down', help='stop and remove everything')
    sub.add_argument('--purge', action='store_true',
                     help='databases, images and instances too')
    commands.add_parser('status', help='what runs; exit code 0: all of it')
    sub = commands.add_parser('openrc', help='print credentials as exports')
    sub.add_argument('user', nargs='?', choices=('admin', 'demo'),
                     default='admin')
    sub = commands.add_parser('run', help='run a command inside a host')
    sub.add_argument('host', choices=layout.ALL_HOSTS)
    sub.add_argument('argv', nargs=argparse.REMAINDER, metavar='COMMAND')
    for name in ('start', 'stop', 'restart'):
        sub = commands.add_parser(name, help=f'{name} single services')
        sub.add_argument('service', nargs='+',
                         help='as status names it: host1.nova-compute')
        if name != 'start':
            sub.add_argument('--grace', type=float, default=8.0,
                             metavar='SECONDS', help='before it is killed')
    for name, text in (
            ('power-off', 'end everything on a compute host at once'),
            ('power-on', 'boot it again')):
        sub = commands.add_parser(name, help=text)
        sub.add_argument('host', nargs='+', choices=layout.COMPUTES)
    sub = commands.add_parser('fake-host', help='a third compute service, '
                              'with the fake driver of Nova')
    sub.add_argument('action', choices=('up', 'down'))
    commands.add_parser('logs', help='print where the logs are')
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.command == 'status':
        return status()
    if args.command == 'openrc':
        project = args.user
        for key, value in layout.openrc(args.user, project).items():
            print(f"export {key}='{value}'")
        return 0
    if args.command == 'logs':
        print(layout.LOGS)
        return 0
    if args.command == 'run':
        enter(args.host, args.argv)
    lock = _lock()
    try:
        if args.command == 'up':
            if (args.driver == 'pycontainer' and importlib.util.find_spec(
                    'nova_pycontainer.driver') is None):
                raise process.CloudError(
                    'nova_pycontainer.driver is not installed')
            up.up(args.driver)
        elif args.command == 'down':
            down.down(args.purge)
        elif args.command == 'power-off':
            for host in args.host:
                power.off(host)
        elif args.command == 'power-on':
            for host in args.host:
                power.on(host, up.settings().get('driver', 'pycontainer'))
        elif args.command == 'fake-host':
            if args.action == 'up':
                up.fake_host_up()
            else:
                up.fake_host_down()
        else:
            if args.command in ('stop', 'restart'):
                process.stop(args.service, args.grace)
            if args.command in ('start', 'restart'):
                for name in args.service:
                    up.start_service(name)
    finally:
        lock.close()
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except process.CloudError as error:
        print(f'ERROR: {error}', file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print('interrupted; "up" goes on from here, "down" takes it away',
              file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # An API's refusal, as a rule: its text says whose.
        layout.LOGS.mkdir(parents=True, exist_ok=True)
        path = process.log_path('cloud.sh')
        with open(path, 'a') as log:
            traceback.print_exc(file=log)
        print(f'ERROR: {type(error).__name__}: {error}\nlog: {path} '
              f'(all logs: {layout.LOGS})', file=sys.stderr)
        sys.exit(1)
