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

"""A terminal connected to a stream, as of ``pycontainer console``."""

import collections.abc as cabc
import contextlib
import os
import select
import socket
import termios
import tty
import typing as ty

#: Ctrl-], as telnet and virsh have it.
LEAVE: ty.Final = b'\x1d'


@contextlib.contextmanager
def raw(fd: int) -> cabc.Iterator[None]:
    """Let a terminal pass everything on, until the end of the body."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def relay(stream: socket.socket, source: int, sink: int) -> bool:
    """Pass bytes both ways until one side ends.

    The end of ``source`` only means that nothing more is typed.

    :param source: descriptor of what is typed; if it is a terminal, Ctrl-]
        leaves
    :param sink: descriptor for what the container prints
    :returns: True if the user left, False if the stream has ended
    """
    interactive = os.isatty(source)
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    poll.register(source, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if stream.fileno() in ready:
            data = _received(stream)
            if not data:
                return False
            while data:
                data = data[os.write(sink, data):]
        if source in ready:
            data = os.read(source, 4096)
            if not data:
                poll.unregister(source)
            typed, leave = data, b''
            if interactive:
                typed, leave, _ = data.partition(LEAVE)
            try:
                stream.sendall(typed)
            except OSError:
                return False
            if leave:
                return True


def _received(stream: socket.socket) -> bytes:
    try:
        return stream.recv(65536)
    except ConnectionError:
        return b''
