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

"""pycontainer: the operator's view of a host's containers.

What belongs to a server of Nova's is better changed through Nova, which does
not learn of everything that is done here.
"""

import argparse
import collections.abc as cabc
import datetime
import json
import os
import re
import sys
import typing as ty

import prettytable

from nova_pycontainer.agent import client as agent_client
from nova_pycontainer.cmd import console
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import versions

Json = dict[str, ty.Any]

DEFAULT_SOCKET: ty.Final = '/run/pycontainer/agent.sock'
_MIB: ty.Final = 1 << 20


class Failure(Exception):
    """Something to tell the user, who made a mistake."""


class Output:
    """Tables for people, JSON for programs."""

    def __init__(self, form: str) -> None:
        self.form = form

    def rows(self, columns: cabc.Mapping[str, cabc.Callable[[Json], object]],
             data: list[Json]) -> None:
        if self.form == 'json':
            self.json(data)
            return
        table = prettytable.PrettyTable([*columns])
        table.align = 'l'
        for item in data:
            table.add_row([_cell(cell(item)) for cell in columns.values()])
        print(table)

    def item(self, data: Json) -> None:
        if self.form == 'json':
            self.json(data)
            return
        table = prettytable.PrettyTable(['Field', 'Value'])
        table.align = 'l'
        for name, value in sorted(data.items()):
            table.add_row([name, _cell(value)])
        print(table)

    def json(self, data: object) -> None:
        print(json.dumps(data, indent=2, default=_printable))

    def done(self, data: object) -> None:
        """Of a change that people need not hear about."""
        if self.form == 'json':
            self.json(data)


def _printable(value: object) -> object:
    assert isinstance(value, bytes)
    return value.decode(errors='replace')


def _cell(value: object) -> str:
    if value is None:
        return ''
    if isinstance(value, str):
        text = value
    elif isinstance(value, dict | list):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    # A name is a tenant's: no control sequence of theirs reaches a terminal.
    return ''.join(c if c.isprintable() else '\ufffd' for c in text)


def _time(value: float | None) -> str | None:
    if value is None:
        return None
    moment = datetime.datetime.fromtimestamp(value, datetime.UTC)
    return moment.strftime('%Y-%m-%dT%H:%M:%SZ')


def _addresses(info: Json) -> str:
    return ', '.join(nic['mac'] for nic in info.get('nics') or [])


_LIST: ty.Final[dict[str, cabc.Callable[[Json], object]]] = {
    'UUID': lambda i: i['uuid'],
    'Name': lambda i: i['name'],
    'State': lambda i: i['state'],
    'PID': lambda i: i['pid'],
    'Processes': lambda i: i['pids'] if i['pid'] else None,
    'Memory (MiB)': lambda i: (
        round(i['memory_bytes'] / _MIB, 1) if i['pid'] else None),
    'CPU time (s)': lambda i: (
        round(i['cpu_time_ns'] / 1e9, 1) if i['pid'] else None),
    'Started': lambda i: _time(i['started_at']),
    'MAC addresses': _addresses,
}

_LAYERS: ty.Final[dict[str, cabc.Callable[[Json], object]]] = {
    'Key': lambda i: i['key'],
    'Image': lambda i: i['image'],
    'Size (MiB)': lambda i: round(i['bytes'] / _MIB, 1),
    'Entries': lambda i: i['entries'],
    'Architecture': lambda i: i['arch'],
    'Created': lambda i: _time(i['created_at']),
}

_CHECKS: ty.Final[dict[str, cabc.Callable[[Json], object]]] = {
    'Check': lambda i: i['title'],
    'Result': lambda i: 'ok' if i['ok'] else (
        'missing' if i['level'] == 'optional' else 'FAILED'),
    'Found': lambda i: i['reason'],
    'Remedy': lambda i: i['remedy'],
}

_PROBLEMS: ty.Final[dict[str, cabc.Callable[[Json], object]]] = {
    'Host': lambda i: i['host'],
    'What': lambda i: i['name'],
    'Process': lambda i: i['process'],
    'Reason': lambda i: i['reason'],
    'Remedy': lambda i: i['remedy'],
}


class Command:
    """What one call of the program does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._out = Output(args.format)
        self._client = agent_client.Client(args.socket, args.agent_timeout)

    def run(self) -> int:
        """:returns: the exit code"""
        return int(getattr(self, self._args.verb)() or 0)

    def _uuid(self) -> str:
        """The one container that is meant.

        :raises Failure: none, or more than one
        """
        wanted = self._args.container
        infos = self._client.list()
        for found in (
            [i['uuid'] for i in infos if i['uuid'] == wanted],
            [i['uuid'] for i in infos if i['name'] == wanted],
            [i['uuid'] for i in infos if len(wanted) >= 4 and
             i['uuid'].startswith(wanted)],
        ):
            if len(found) == 1:
                return str(found[0])
            if found:
                raise Failure(f'{wanted!r} may be any of '
                              f'{", ".join(sorted(found))}')
        raise Failure(f'there is no container {wanted!r} on this host')

    def list(self) -> None:
        self._out.rows(
            _LIST, sorted(self._client.list(), key=lambda i: i['name']))

    def show(self) -> None:
        self._out.item(self._client.info(self._uuid()))

    def host(self) -> None:
        self._out.item(self._client.host_info())

    def preflight(self) -> int:
        result = self._client.preflight()
        if self._out.form == 'json':
            self._out.json(result)
        else:
            self._out.rows(_CHECKS, result['checks'])
            print(f'Containers: {_can(result["can_run"])}; live migration: '
                  f'{_can(result["can_migrate"])}')
        return 0 if result['can_migrate'] else 1

    def migrate(self) -> int:
        if not self._args.dry_run:
            raise Failure('a server is migrated by Nova: openstack server '
                          'migrate --live-migration. Here is only --dry-run')
        found = [('source', self._client.migration_check_source(
            self._uuid()))]
        if self._args.to:
            there = agent_client.Client(
                self._args.to, self._args.agent_timeout)
            found.append(('destination', there.migration_check_destination(
                found[0][1]['facts'])))
            self._check_formats(*(result for _, result in found))
        problems = [{'host': host, **p} for host, result in found
                    for p in result['problems']]
        if self._out.form == 'json':
            self._out.json(dict(found))
            return 1 if problems else 0
        warnings = [{'host': host, **w} for host, result in found
                    for w in result['warnings']]
        if problems or warnings:
            self._out.rows(_PROBLEMS, problems + warnings)
        facts = found[0][1]['facts']
        print(f'{facts["processes"]} processes, '
              f'{facts["memory_bytes"] / _MIB:.0f} MiB of memory and at most '
              f'{facts["disk_bytes"] / _MIB:.0f} MiB of files to move. '
              + ('It cannot be live-migrated' if problems else
                 'Nothing was found that keeps it from it'))
        return 1 if problems else 0

    @staticmethod
    def _check_formats(source: Json, destination: Json) -> None:
        """Add what a destination of a former release cannot know."""
        names = [str(r['facts'].get('hostname')) for r in (
            source, destination)]
        too_new = versions.too_new(
            versions.format_of(source['facts']), names[0],
            versions.format_of(destination['facts']), names[1])
        if too_new is not None and not any(
                p['name'] == 'protocol' for p in destination['problems']):
            destination['problems'].append({
                'name': 'format', 'reason': too_new[0],
                'remedy': too_new[1], 'process': None})

    def layers(self) -> None:
        if self._args.delete:
            self._client.layer_delete(self._args.delete)
            self._out.done({'deleted': self._args.delete})
        else:
            self._out.rows(_LAYERS, self._client.layer_list())

    def logs(self) -> None:
        uuid = self._uuid()
        data = self._client.console_log(uuid, self._args.bytes)
        if self._out.form == 'json':
            self._out.json({'uuid': uuid, 'log': data})
        else:
            _write(sys.stdout, data)

    def console(self) -> int:
        uuid = self._uuid()
        typed, shown = sys.stdin.fileno(), sys.stdout.fileno()
        with self._client.console_attach(uuid) as stream:
            with console.raw(typed):
                # From now on what is typed is the container's.
                print(f'Connected to {uuid}; Ctrl-] ends it', end='\r\n',
                      file=sys.stderr, flush=True)
                left = console.relay(stream, typed, shown)
        print('' if left else '\nThe console has ended', file=sys.stderr)
        return 0

    def exec(self) -> int:
        argv = self._args.command
        if argv[:1] == ['--']:
            argv = argv[1:]
        if not argv:
            raise Failure('there is no program to execute')
        env = dict(item.partition('=')[::2] for item in self._args.env)
        done = self._client.exec(
            self._uuid(), argv, env=env, timeout_s=self._args.timeout,
            stdin=sys.stdin.buffer.read() if self._args.stdin else b'')
        if self._out.form == 'json':
            self._out.json(done)
        else:
            _write(sys.stdout, done['stdout'])
            _write(sys.stderr, done['stderr'])
            if done['truncated']:
                print('(more output than this was cut off)',
                      file=sys.stderr)
        return int(done['exit_code'])

    def pause(self) -> None:
        self._out.done(self._client.pause(self._uuid()))

    def unpause(self) -> None:
        self._out.done(self._client.unpause(self._uuid()))

    def start(self) -> None:
        uuid = self._uuid()
        if self._client.info(uuid)['state'] in ('defined', 'stopped'):
            self._client.prepare(uuid)
        self._out.done(self._client.start_container(uuid))

    def stop(self) -> None:
        self._out.done(self._client.stop(self._uuid(), self._args.timeout))

    def kill(self) -> None:
        self._out.done(self._client.kill(self._uuid()))

    def reboot(self) -> None:
        self._out.done(self._client.reboot(
            self._uuid(), 0 if self._args.hard else self._args.timeout))

    def delete(self) -> None:
        uuid = self._uuid()
        self._confirm(f'Delete container {uuid} and all of its files?')
        self._client.delete(uuid)
        self._out.done({'deleted': uuid})

    def migration(self) -> None:
        uuid = self._uuid()
        self._confirm(
            f'Run {uuid} here? The other host must be off, or be seen not to '
            'run it.' if self._args.runs == 'here' else
            f'Give up what is here of {uuid}? What the other host has of it '
            'is all that is left then.')
        self._out.done(self._client.migration_resolve(uuid, self._args.runs))

    def _confirm(self, question: str) -> None:
        if self._args.yes:
            return
        if not sys.stdin.isatty():
            raise Failure(
                f'{self._args.verb} needs --yes if nobody can be asked')
        print(f'{question} [y/N] ', end='', file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ('y', 'yes'):
            raise Failure('nothing was done')


def _can(value: bool) -> str:
    return 'yes' if value else 'NO'


def _write(stream: ty.TextIO, data: bytes) -> None:
    stream.flush()
    stream.buffer.write(data)
    stream.buffer.flush()


def _seconds(text: str) -> float:
    if not re.fullmatch(r'\d+(\.\d+)?', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no number of seconds')
    return float(text)


def _parser() -> argparse.ArgumentParser:
    # Before and after the verb: whoever forgets it appends it.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        '-f', '--format', choices=('table', 'json'),
        default=argparse.SUPPRESS, help='how to print (default: table)')
    parser = argparse.ArgumentParser(
        prog='pycontainer', parents=[common],
        description='Look at and control the system containers of this '
        'host. Servers of Nova\'s are better controlled through Nova.')
    parser.add_argument(
        '--socket', metavar='PATH',
        default=os.environ.get('PYCONTAINER_AGENT_SOCKET', DEFAULT_SOCKET),
        help='the agent\'s socket (default: PYCONTAINER_AGENT_SOCKET, else '
        f'{DEFAULT_SOCKET})')
    parser.add_argument(
        '--agent-timeout', metavar='SECONDS', type=_seconds, default=120.0,
        help='limit for one call of the agent (default: %(default)g)')
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

    def verb(name: str, text: str,
             container: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=text, description=text, parents=[common])
        if container:
            _container(sub)
        return sub

    verb('list', 'List the containers', container=False)
    verb('show', 'Show all that is known of a container')
    verb('host', 'Show what this host has', container=False)
    verb('console', 'Connect to a container\'s console')
    sub = verb('exec', 'Execute a program in a container, as its root')
    sub.add_argument('--timeout', type=_seconds, default=60.0,
                     metavar='SECONDS', help='then it is killed '
                     '(default: %(default)g)')
    sub.add_argument('--env', action='append', default=[], metavar='NAME=V',
                     help='set a variable of its environment')
    sub.add_argument('--stdin', action='store_true',
                     help='give it what comes on standard input')
    sub.add_argument('command', nargs=argparse.REMAINDER,
                     metavar='-- PROGRAM [ARGUMENT...]')
    sub = verb('logs', 'Print the end of what a container printed on its '
               'console')
    sub.add_argument('--bytes', type=int, default=102400, metavar='N',
                     help='how much of it (default: %(default)d)')
    verb('pause', 'Freeze all processes of a container')
    verb('unpause', 'Thaw them')
    verb('start', 'Start a container that is stopped')
    sub = verb('stop', 'Shut a container down')
    _timeout(sub)
    verb('kill', 'Kill all processes of a container')
    sub = verb('reboot', 'Shut a container down and start it again')
    _timeout(sub)
    sub.add_argument('--hard', action='store_true', help='kill it instead')
    sub = verb('delete', 'Kill a container and delete all of its files')
    _yes(sub)
    verb('preflight', 'Check what this host can do: run containers, and '
         'live-migrate them', container=False)
    sub = verb('migrate', 'Check whether a container can be live-migrated')
    sub.add_argument('--dry-run', action='store_true',
                     help='only check; the container does not notice')
    sub.add_argument('--to', metavar='SOCKET', help='check too whether the '
                     'host of this agent\'s socket could take it')
    sub = verb('migration', 'Settle a live migration whose other host will '
               'never answer again', container=False)
    sub.add_argument('action', choices=['resolve'])
    _container(sub)
    runs = sub.add_mutually_exclusive_group(required=True)
    runs.add_argument(
        '--here', dest='runs', action='store_const', const='here',
        help='let what is here of it run. The other host must be off for '
        'good, or be seen not to have it')
    runs.add_argument(
        '--elsewhere', dest='runs', action='store_const', const='elsewhere',
        help='give up what is here of it: the other host has it')
    _yes(sub)
    sub = verb('layers', 'List the unpacked images', container=False)
    sub.add_argument('--delete', metavar='KEY',
                     help='delete one that no container uses')
    return parser


def _container(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('container', help='uuid, beginning of a uuid, or name')


def _yes(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('-y', '--yes', action='store_true', help='do not ask')


def _timeout(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('--timeout', type=_seconds, default=60.0,
                     metavar='SECONDS', help='time to shut down, before it '
                     'is killed (default: %(default)g)')


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv, argparse.Namespace(format='table'))
    try:
        return Command(args).run()
    except errors.ContainerError as e:
        if args.format == 'json':
            print(json.dumps({'error': e.to_dict()}, indent=2))
        print(f'pycontainer: {e}', file=sys.stderr)
    except Failure as e:
        print(f'pycontainer: {e}', file=sys.stderr)
    except BrokenPipeError:
        # The reader has seen enough. Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == '__main__':
    sys.exit(main())
