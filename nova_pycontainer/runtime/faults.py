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

"""Faults on demand, for the tests that prove what happens after one.

``PYCONTAINER_FAULTS`` in the agent's environment names points and what is to
happen there, once each::

    source.committed=kill,destination.restore=raise,prepare.network=sleep:5,
    source.frozen=wait:/tmp/go

"wait" is until there is a file of that name. ``@FILE`` in place of all that
is a file of it, looked at anew at each point, so that one agent serves many
tests; what has happened is taken out of it.

``frame=twice`` has the next frame to another host sent twice, ``garbage``
sends as many random bytes instead, and ``nonsense`` one of the same type that
says something else; see :func:`mangled`.

The names are those of the code's own steps: each step of a
:class:`.revert.Reverter`, and the points of a migration. With
``PYCONTAINER_FAULT_POINTS`` every point that is passed is appended to that
file, so that a test knows all of them without a list of its own.
"""

import json
import os
import signal
import struct
import threading
import time
import typing as ty

_lock = threading.Lock()


def _parse(text: str) -> dict[str, str]:
    return dict(
        item.split('=', 1) for item in text.split(',') if '=' in item)


_text: ty.Final = os.environ.get('PYCONTAINER_FAULTS', '')
_file: ty.Final = _text.removeprefix('@') if _text.startswith('@') else None
_plan: ty.Final = {} if _file else _parse(_text)
_record: ty.Final = os.environ.get('PYCONTAINER_FAULT_POINTS')


def _take(name: str) -> str | None:
    if _file is None:
        return _plan.pop(name, None)
    try:
        with open(_file) as f:
            plan = _parse(f.read())
        action = plan.pop(name, None)
        if action is not None:
            with open(_file, 'w') as f:
                f.write(','.join(f'{k}={v}' for k, v in plan.items()))
    except FileNotFoundError:
        return None
    return action


def point(name: str) -> None:
    """A moment at which a test may want something to go wrong.

    :raises OSError: a test wanted it
    """
    if not _plan and not _file and not _record:
        return
    with _lock:
        action = _take(name)
        if _record:
            with open(_record, 'a') as f:
                f.write(f'{name}\n')
    if action == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == 'raise':
        raise OSError(5, f'injected at {name}')
    elif action and action.startswith('sleep:'):
        time.sleep(float(action.removeprefix('sleep:')))
    elif action and action.startswith('wait:'):
        while not os.path.exists(action.removeprefix('wait:')):
            time.sleep(0.02)


def mangled(frame: bytes) -> bytes:
    """What is sent in place of a frame of the channel.

    :param frame: its length (4 bytes, big endian) and a JSON object, see
        :mod:`.migration.channel`
    """
    if not _plan and not _file:
        return frame
    with _lock:
        action = _take('frame')
    if action == 'twice':
        return frame * 2
    if action == 'garbage':
        return os.urandom(len(frame))
    if action == 'nonsense':
        said = json.loads(frame[4:])
        body = json.dumps(said | {
            key: _other(said[key])
            for key in set(said) - {'type', 'v', 'number'} or ['number']
        }).encode()
        return struct.pack('>I', len(body)) + body
    return frame


def _other(value: object) -> object:
    """Of another kind."""
    return [value] if isinstance(value, dict | str) else {'is': 'nothing'}
