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

"""How fast data goes to a guest and from it: a real transfer.

Only the standard library is needed, and in the guest ``nc`` and ``timeout`` of
busybox.
"""

import contextlib
import socket
import threading
import time

#: Seconds that are measured, after those in which TCP finds its speed.
_SECONDS = 1.5
_BEFORE = 0.5
_CHUNK = 1 << 16
_PATIENCE = 30


def of(address, shell, name='eth0'):
    """Return bytes per second, to the guest and from it.

    :param address: one of ours, that the guest can reach
    :param shell: runs a script in the guest and returns what it prints
    :param name: of the interface in the guest
    """
    return inbound(address, shell, name), outbound(address, shell)


@contextlib.contextmanager
def _connection(address, shell, redirections):
    with socket.create_server((address, 0)) as server:
        server.settimeout(_PATIENCE)
        # Less than this machine would keep back by itself.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK)
        port = server.getsockname()[1]
        shell(f'timeout {_PATIENCE} nc {address} {port} {redirections} '
              '2>/dev/null &')
        made, _ = server.accept()
    with made:
        made.settimeout(_PATIENCE)
        yield made


def inbound(address, shell, name='eth0'):
    """As the guest counts: what is sent here may not get there."""
    counter = f'/sys/class/net/{name}/statistics/rx_bytes'
    with _connection(address, shell, '</dev/null >/dev/null') as made:
        def send():
            with contextlib.suppress(OSError):
                while True:
                    made.sendall(bytes(_CHUNK))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            before, after = shell(
                f'sleep {_BEFORE}; cat {counter}; sleep {_SECONDS}; '
                f'cat {counter}').split()
        finally:
            made.shutdown(socket.SHUT_RDWR)
            sender.join()
    return (int(after) - int(before)) / _SECONDS


def outbound(address, shell):
    with _connection(address, shell, '</dev/zero >/dev/null') as made:
        _receive(made, _BEFORE)
        began = time.monotonic()
        return _receive(made, _SECONDS) / (time.monotonic() - began)


def _receive(made, seconds):
    total = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        total += len(made.recv(_CHUNK))
    return total
