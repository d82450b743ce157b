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

"""What the keeper accepts: the form of its requests, checked by hand.

A schema library would cost more memory than the keeper itself.
"""

import collections.abc as cabc
import json
import re
import typing as ty

#: Environment of a command for which the caller gave none.
DEFAULT_ENV: ty.Final = {
    'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
    'LC_ALL': 'C.UTF-8',
}

#: Bounds of numbers: a day, a tenth of a day of console at full speed.
MAX_SECONDS: ty.Final = 86400
MAX_LOG: ty.Final = 1 << 30
MIN_LOG: ty.Final = 4096

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]{0,63}')


class Refused(Exception):
    """A request that was understood and is answered with an error.

    The codes are those of :mod:`nova_pycontainer.runtime.errors`.
    """

    def __init__(
        self, code: str, message: str, *, step: str | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.step = step
        self.cause = cause

    def as_dict(self) -> dict[str, str | None]:
        return {'code': self.code, 'message': self.message,
                'step': self.step, 'cause': self.cause}


class Malformed(Refused):
    """Not a request at all: whoever sends this is disconnected."""

    def __init__(self, message: str, code: str = 'invalid') -> None:
        super().__init__(code, message)


def request(
    packet: bytes, version: int
) -> tuple[int, str, dict[str, ty.Any]]:
    """Take a packet apart.

    :returns: the caller's number for it, the verb and its parameters
    :raises Malformed: not one JSON object of the right form, or
        (``unsupported``) of another version
    """
    try:
        message = json.loads(packet)
    except (ValueError, RecursionError) as e:
        raise Malformed('the packet is not JSON') from e
    if not isinstance(message, dict):
        raise Malformed('the packet is not a JSON object')
    ident, verb = message.get('id'), message.get('verb')
    params = message.get('params', {})
    if not _is_int(ident) or not isinstance(verb, str):
        raise Malformed('the packet has no id or no verb')
    if not isinstance(params, dict):
        raise Malformed('the parameters are not an object')
    if message.get('v') != version:
        raise Malformed(
            f'the keeper speaks version {version} of its protocol, '
            f'not {message.get("v")!r}', 'unsupported')
    return ty.cast(int, ident), verb, params


def _is_int(value: object) -> bool:
    # For Python, True is a number.
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: object) -> bool:
    if not isinstance(value, str) or '\0' in value:
        return False
    try:
        # Lone surrogates are valid JSON and no valid argument.
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(_text(v) for v in value)


def _argv(value: object) -> bool:
    return _texts(value) and bool(value) and bool(
        ty.cast(list[str], value)[0])


def _env(value: object) -> bool:
    return isinstance(value, dict) and all(
        _text(k) and _text(v) and k and '=' not in k
        for k, v in value.items())


def _path(value: object) -> bool:
    return _text(value) and ty.cast(str, value).startswith('/')


def _paths(value: object) -> bool:
    return isinstance(value, list) and all(_path(v) for v in value)


def _name(value: object) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _numbers(value: object) -> bool:
    return isinstance(value, list) and len(set(map(repr, value))) == len(
        value) and all(_between(0, 255)(v) for v in value)


def _between(low: int, high: int) -> cabc.Callable[[object], bool]:
    return lambda value: _is_int(value) and (
        low <= ty.cast(int, value) <= high)


def _seconds(value: object) -> bool:
    return (_is_int(value) or isinstance(value, float)) and (
        0 < ty.cast(float, value) <= MAX_SECONDS)


def _or_null(
    check_: cabc.Callable[[object], bool]
) -> cabc.Callable[[object], bool]:
    return lambda value: value is None or check_(value)


Checks = dict[str, cabc.Callable[[object], bool]]

_COMMAND: Checks = {
    'argv': _argv, 'env?': _or_null(_env), 'cwd?': _or_null(_path),
    'fds?': _numbers, 'cgroup_procs?': _paths,
}

#: Verb → parameter → its check; a "?" marks one that may be left out.
VERBS: ty.Final[dict[str, Checks]] = {
    'ping': {},
    'run': {**_COMMAND, 'timeout_s': _seconds},
    'spawn': _COMMAND,
    'watch': {'uuid': _name, 'pid': _between(1, 1 << 22),
              'exit_path': _path,
              'start_time?': _or_null(_between(0, 1 << 62))},
    'hold': {'uuid': _name, 'log_path': _path,
             'max_bytes': _between(MIN_LOG, MAX_LOG),
             'fresh?': lambda v: isinstance(v, bool)},
    'attach': {'uuid': _name, 'mode?': lambda v: v in ('rw', 'ro')},
    'resize': {'uuid': _name, 'rows': _between(1, 65535),
               'columns': _between(1, 65535)},
    'release': {'uuid': _name},
    'list': {'after?': _or_null(_name)},
    'subscribe': {},
}


def features() -> list[str]:
    """Parameters that not every keeper of this version has known.

    A client that finds one missing does without it: the keeper is older than
    the agent for as long as any container runs.
    """
    return sorted(
        f'{verb}.{name.rstrip("?")}' for verb, checks in VERBS.items()
        for name in checks if name.endswith('?'))


#: How many descriptors must come with a request; else as many as "fds" names.
_FDS: ty.Final = {'hold': 1, 'attach': 1}


def check(verb: str, params: dict[str, ty.Any], fds: int) -> None:
    """Refuse a request with missing, unknown or wrong parameters.

    :param fds: how many descriptors came with it
    :raises Refused: ``invalid``
    """
    checks = VERBS.get(verb)
    if checks is None:
        raise Refused('invalid', f'unknown verb {verb!r}')
    known = {name.rstrip('?'): name for name in checks}
    for name in params:
        if name not in known:
            raise Refused('invalid', f'{verb}: unknown parameter {name!r}')
    for name, key in known.items():
        if name not in params:
            if key == name:
                raise Refused('invalid', f'{verb}: {name} is missing')
        elif not checks[key](params[name]):
            raise Refused('invalid', f'{verb}: wrong value of {name}')
    expected = _FDS.get(verb, len(params.get('fds') or []))
    if fds != expected:
        raise Refused(
            'invalid', f'{verb}: {expected} descriptors expected, {fds} came')
