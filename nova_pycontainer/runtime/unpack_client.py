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

"""Starting the process that unpacks, feeding it, and reading its answer.
"""

import collections.abc as cabc
import ctypes
import errno
import json
import os
import pathlib
import select
import selectors
import subprocess
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import syscalls
from nova_pycontainer.runtime import unpack_job

LOG = logging.getLogger(__name__)

_MODULE: ty.Final = 'nova_pycontainer.runtime.unpack'
_PIPE_BYTES: ty.Final = 1 << 20
#: More than it may say is more than we read.
_MAX_ANSWER: ty.Final = 64 << 10
#: What its answer may contain: what a wrong image can cause.
_CODES: ty.Final = frozenset((
    'image_is_disk', 'image_not_archive', 'image_too_large',
    'image_too_many_entries', 'image_truncated', 'image_unsafe_entry',
    'image_unsupported', 'image_wrong_arch', 'no_space', 'unsupported'))

_libc: ty.Final = ctypes.CDLL(None, use_errno=True)


def sync_filesystem(path: pathlib.Path) -> None:
    """Write everything of the file system that ``path`` is on to its disk.

    One call for a whole tree: fsync of each of its files takes many times
    longer. It cannot be interrupted; how long it takes depends on the disk
    and on what others have written.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) < 0:
            raise syscalls.oserror('syncfs', str(path))
    finally:
        os.close(fd)


def run(
    python: str, job: unpack_job.Job, chunks: cabc.Iterator[bytes],
    timeout: float,
) -> unpack_job.Result:
    """Unpack the image that ``chunks`` gives, in a process of its own.

    :param timeout: seconds, for all of it
    :raises ContainerError: what the process says is wrong with the image, or
        ``timeout``, ``internal``
    """
    process = subprocess.Popen(
        # -I: neither the environment nor the working directory has a say in
        # what is imported. utf8: names are UTF-8 whatever the locale.
        [python, '-I', '-X', 'utf8', '-m', _MODULE, job.to_json()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0, pipesize=_PIPE_BYTES, cwd='/', start_new_session=True)
    try:
        answer, complaint = _feed(
            process, chunks, time.monotonic() + timeout)
        # It has closed its output, so it is at its end.
        code = process.wait(30)
    except subprocess.TimeoutExpired:
        raise errors.ContainerError(
            'internal', 'the process that unpacks does not end') from None
    finally:
        _stop(process)
    result = _judge(job, code, answer, complaint)
    if result.nested:
        _lift(pathlib.Path(job.root))
    return result


def _lift(root: pathlib.Path) -> None:
    """Put the one directory that is in ``root`` in its place.

    Nobody writes there any more; what is there is not trusted.

    :raises ContainerError: ``internal``: it is another than the process says
    """
    with os.scandir(root) as entries:
        inner = next(entries, None)
    try:
        if inner is None or not inner.is_dir(follow_symlinks=False):
            raise OSError(errno.ENOTDIR, 'there is no directory in it')
        outer = root.with_name(root.name + '.archive')
        root.rename(outer)
        (outer / inner.name).rename(root)
        outer.rmdir()
    except OSError as e:
        raise errors.ContainerError(
            'internal', 'the process that unpacks the image has left '
            'something else behind than it says', cause=str(e),
            remedy='See the log of pycontainer-agent on that host') from e


def _stop(process: 'subprocess.Popen[bytes]') -> None:
    """Make sure that nobody writes to the directory any more."""
    process.kill()
    assert process.stdin and process.stdout and process.stderr
    process.stdin.close()
    # The kernel kills the worker along with its supervisor; the worker is
    # gone when the last descriptor of its output is.
    try:
        process.wait(30)
        while select.select([process.stdout], [], [], 30)[0]:
            if not os.read(process.stdout.fileno(), _MAX_ANSWER):
                break
    finally:
        process.stdout.close()
        process.stderr.close()


def _feed(
    process: 'subprocess.Popen[bytes]', chunks: cabc.Iterator[bytes],
    deadline: float,
) -> tuple[bytes, bytes]:
    """Give the process its input; return what it says on both outputs."""
    assert process.stdin and process.stdout and process.stderr
    out, err = bytearray(), bytearray()
    pending = memoryview(b'')
    with selectors.DefaultSelector() as selector:
        for file, kind in (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
        ):
            os.set_blocking(file.fileno(), False)
            selector.register(file, kind)
        while len(selector.get_map()):
            left = deadline - time.monotonic()
            ready = selector.select(max(left, 0))
            if left <= 0 or not ready:
                raise errors.ContainerError(
                    'timeout', 'unpacking takes too long',
                    remedy='Look at the load of this host and at the image '
                    'store')
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    if not pending:
                        pending = memoryview(next(chunks, b''))
                    try:
                        if pending:
                            pending = pending[os.write(key.fd, pending):]
                            continue
                    except BrokenPipeError:
                        pass  # it has seen enough, and says why
                    selector.unregister(process.stdin)
                    process.stdin.close()
                    continue
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    out += data[:_MAX_ANSWER + 1 - len(out)]
                else:
                    err += data
                    del err[:-4096]
    return bytes(out), bytes(err)


def _judge(
    job: unpack_job.Job, code: int, answer: bytes, complaint: bytes
) -> unpack_job.Result:
    """Turn exit code and answer, neither of them trusted, into a result."""
    try:
        if len(answer) > _MAX_ANSWER:
            raise ValueError('too long')
        data = json.loads(answer)
        if data['ok'] is True and code == 0:
            entries, size = data['entries'], data['bytes']
            notes = {archive.show(str(k))[1:-1]: int(v)
                     for k, v in list(data['notes'].items())[:64]}
            if not (type(entries) is int and 0 < entries <= job.limits.entries
                    and type(size) is int and 0 <= size <= job.max_bytes):
                raise ValueError('figures out of range')
            return unpack_job.Result(
                entries, size, notes, data.get('nested') is True)
        error = errors.ContainerError.from_dict(data['error'])
        if data['ok'] is False and error.code in _CODES:
            return _refuse(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    trace = ascii(complaint.decode('utf-8', 'replace')[-2000:])
    LOG.error('the process that unpacks ended with %s: %s', code,
              trace[-4000:])
    # The last line names the exception.
    text = trace[1:-1].rstrip('\\n').rpartition('\\n')[2][-200:]
    raise errors.ContainerError(
        'internal', 'the process that unpacks the image failed',
        cause=f'exit code {code}' + (text and f', {text}'),
        remedy='See the log of pycontainer-agent on that host')


def _refuse(error: errors.ContainerError) -> ty.NoReturn:
    def clean(text: str | None) -> str | None:
        return text and ''.join(
            c if ' ' <= c <= '~' else '?' for c in str(text)[:1000])

    raise errors.ContainerError(
        error.code, clean(error.message) or '', cause=clean(error.cause),
        remedy=clean(error.remedy))
