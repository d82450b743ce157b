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

"""What of a guest does not fit on a destination, in words for the operator."""

import collections.abc as cabc
import contextlib
import os
import pathlib
import socket
import threading

from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import unpack_client

#: With less than this a file system is full, whatever its error said.
_FULL = 16 << 20
#: Seconds in which the disk has to take what was sent last.
_TIMEOUT = 120.0
_REMEDY = 'Free space there, or migrate to another host'


def _said() -> str:
    return f'do not fit on {socket.gethostname()}'


def _full(
    what: str, cause: str, remedy: str | None = None
) -> errors.ContainerError:
    return errors.ContainerError(
        'no_space', f'{what} {_said()}',
        cause=cause, remedy=remedy or _REMEDY)


@contextlib.contextmanager
def needed(
    what: str, directory: pathlib.Path | None = None
) -> cabc.Iterator[None]:
    """Let an error of a full disk say what did not fit, and where.

    It is read on the other host, or in Nova.

    :param directory: where it goes to on this host. When that is full, a file
        system in a file there gives all kinds of errors
    """
    try:
        yield
    except (OSError, errors.ContainerError) as e:
        if isinstance(e, errors.ContainerError) and _said() in e.message:
            # By another thread, about what did not fit there.
            raise
        cause, remedy, code = str(e), None, None
        if isinstance(e, errors.ContainerError):
            cause, remedy = e.cause or e.message, e.remedy
            code = e.code
        elif e.errno in errors.FULL:
            code = 'no_space'
        free = free_if_full(directory)
        if code == 'no_space':
            raise _full(what, cause, remedy) from e
        if free is not None and code in (None, 'internal'):
            raise _full(
                what, f'{free >> 20} MiB are free in {directory}: {cause}',
            ) from e
        raise


def free_if_full(directory: pathlib.Path | None) -> int | None:
    """Bytes that are free, if it is next to nothing."""
    if directory is None:
        return None
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    free = status.f_bavail * status.f_frsize
    return free if free < _FULL else None


def check_written(
    what: str, place: disk.Disk, directory: pathlib.Path
) -> None:
    """Make sure that the files of a disk are where they belong.

    A file system in a file takes what its own size allows. That the file
    itself cannot grow is said to nobody but who asks for the end of the
    writing.

    :param directory: where the file is
    :raises ContainerError: ``no_space``
    :raises OSError: the disk of the host is broken
    """
    if not place.in_file:
        return
    with needed(what, directory):
        unpack_client.sync_filesystem(place.directory)


class Writing:
    """:func:`check_written` in the background, as often as it is started."""

    def __init__(
        self, what: str, place: disk.Disk, directory: pathlib.Path
    ) -> None:
        self._what, self._place, self._directory = what, place, directory
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread = threading.Thread(
            target=self._run, name='writing', daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            check_written(self._what, self._place, self._directory)
        except BaseException as e:
            self._error = self._error or e

    def result(self) -> None:
        """Wait for the end.

        :raises ContainerError: ``no_space``, ``timeout``
        """
        if self._thread is None:
            return
        self._thread.join(_TIMEOUT)
        if self._thread.is_alive():
            raise errors.ContainerError(
                'timeout', f'{self._what} are not on the disk after '
                f'{_TIMEOUT:.0f} s', remedy='Look at the disk of '
                f'{socket.gethostname()}')
        if self._error is not None:
            raise self._error
