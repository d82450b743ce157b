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

"""The process that unpacks one image: ``python -m ...runtime.unpack JOB``.

Standard input is the image. Standard output is one JSON object when it is
over: ``{"ok": true, "entries": …, "bytes": …, "notes": {…}, "nested": …}``
or ``{"ok": false, "error": {…}}`` with a ContainerError in it. Whoever reads
that must not trust it: by then this process has read the image.
"""

import json
import os
import pathlib
import resource
import signal
import sys
import traceback
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import extract
from nova_pycontainer.runtime import imagestream
from nova_pycontainer.runtime import ociarchive
from nova_pycontainer.runtime import sandbox
from nova_pycontainer.runtime import unpack_job
from nova_pycontainer.runtime import unpack_layers

#: The worker opens one file at a time; the rest is room for the interpreter.
_OPEN_FILES: ty.Final = 64


def unpack(
    fd: int, root_fd: int, max_bytes: int, limits: archive.Limits
) -> unpack_job.Result:
    """Unpack the image that ``fd`` gives into the directory ``root_fd``.

    What it becomes depends on what it holds alone, and not on what somebody
    calls it: images with the same data share a layer.

    :raises ContainerError: see :class:`.extract.Extractor` and
        :func:`.unpack_layers.unpack`
    """
    source = imagestream.Input(fd)
    packed, pieces = imagestream.decompressed(source)
    reader = imagestream.tar(pieces, packed, limits, lambda: source.consumed)
    result = extract.Extractor(root_fd, reader, limits, max_bytes).run()
    if ociarchive.is_one(root_fd):
        return unpack_layers.unpack(root_fd, result, max_bytes, limits)
    return result


def _answer(answer: dict[str, ty.Any]) -> int:
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(1, data):]
    return 0 if answer['ok'] else 1


def _work(job: unpack_job.Job) -> int:

    def out_of_time(*_: object) -> ty.NoReturn:
        raise archive.too_large(
            f'unpacking the image takes more than {job.limits.cpu_seconds} '
            f's of processor time', 'Use a smaller image')

    # As PID 1 of its namespace it would not be ended by this signal.
    signal.signal(signal.SIGXCPU, out_of_time)
    root_fd = os.open('/', os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        result = unpack(0, root_fd, job.max_bytes, job.limits)
    except errors.ContainerError as e:
        return _answer({'ok': False, 'error': e.to_dict()})
    except MemoryError:
        return _answer({'ok': False, 'error': archive.too_much_memory(
            f'more than {job.limits.memory_bytes} bytes').to_dict()})
    except Exception:
        traceback.print_exc()
        return 2
    return _answer({'ok': True, 'entries': result.entries,
                    'bytes': result.bytes, 'notes': result.notes,
                    'nested': result.nested})


def main(arguments: list[str]) -> int:
    job = unpack_job.Job.from_json(arguments[0])
    sandbox.die_with_parent()
    limits = job.limits
    rlimits = {
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        # It must not start anything. The limit counts per user of the host,
        # and all unpacking goes by the same ids.
        resource.RLIMIT_NPROC: 0,
    }
    try:
        return sandbox.run(
            pathlib.Path(job.root), job.base, rlimits, lambda: _work(job))
    except OSError as e:
        traceback.print_exc()
        return _answer({'ok': False, 'error': errors.ContainerError(
            'unsupported', 'this host cannot unpack images safely',
            cause=str(e), remedy='It takes Linux 5.12 or later and a file '
            'system with idmapped mounts (ext4, XFS, Btrfs) for the layers'
        ).to_dict()})


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
