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

"""Fills ramfs mounts inside a mount namespace that CRIU is assembling.

Run as a program: it reads one JSON document and ends. Only the standard
library, and no threads: the kernel lets a process enter a mount namespace
only if it shares its root and working directory with nobody.
"""

import base64
import ctypes
import glob
import json
import os
import stat
import sys
import typing as ty

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_BIND = 0x1000
CLONE_NEWNS = 0x00020000
RANGE = 65536

_libc = ctypes.CDLL(None, use_errno=True)

_FLAGS = {
    os.ST_RDONLY: MS_RDONLY, os.ST_NOSUID: MS_NOSUID, os.ST_NODEV: MS_NODEV,
    os.ST_NOEXEC: MS_NOEXEC, 0x2000: MS_NOSYMFOLLOW,
}


def _remount(path: str, flags: int) -> None:
    if _libc.mount(None, os.fsencode(path), None,
                   ctypes.c_ulong(MS_REMOUNT | MS_BIND | flags), None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def _make(top: str, item: dict[str, ty.Any], base_id: int) -> None:
    path = os.path.join(top, item['path'])
    mode, uid, gid = item['mode'], item['uid'], item['gid']
    if not (base_id <= uid < base_id + RANGE and
            base_id <= gid < base_id + RANGE):
        raise ValueError(f'{item["path"]} has an owner outside the container')
    if '..' in item['path'].split('/'):
        raise ValueError(f'{item["path"]} leads out of its mount')
    if stat.S_ISDIR(mode):
        if item['path'] != '.':
            os.mkdir(path)
    elif stat.S_ISREG(mode):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(fd, 'wb') as f:
            f.write(base64.b64decode(item['data']))
    elif stat.S_ISLNK(mode):
        os.symlink(item['target'], path)
    else:
        return


def _attributes(top: str, item: dict[str, ty.Any]) -> None:
    """After the content, since a directory may be read-only."""
    path = os.path.join(top, item['path'])
    if os.path.lexists(path):
        os.chown(path, item['uid'], item['gid'], follow_symlinks=False)
    if not (stat.S_ISDIR(item['mode']) or stat.S_ISREG(item['mode'])):
        return
    os.chmod(path, stat.S_IMODE(item['mode']))
    os.utime(path, ns=(item['mtime'], item['mtime']))


def main() -> None:
    document = json.load(sys.stdin)
    base_id = document['base_id']
    fd = os.open(f'/proc/{document["pid"]}/ns/mnt', os.O_RDONLY)
    if _libc.setns(fd, CLONE_NEWNS) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), 'setns')
    for mount in document['mounts']:
        # CRIU's own name. Somebody else's of that kind makes two, and then
        # none is taken.
        found = glob.glob(
            f'/tmp/.criu.mntns.*/mnt-{mount["id"]:010d}')  # noqa: S108
        if len(found) != 1:
            raise FileNotFoundError(f'mount {mount["id"]}: {found}')
        top = found[0]
        flags = 0
        have = os.statvfs(top).f_flag
        for statvfs_flag, mount_flag in _FLAGS.items():
            if have & statvfs_flag:
                flags |= mount_flag
        _remount(top, flags & ~MS_RDONLY)
        # The file system belongs to the guest's user namespace, where our
        # own id does not exist; the guest's root does.
        _libc.setfsgid(base_id)
        _libc.setfsuid(base_id)
        for item in mount['entries']:
            _make(top, item, base_id)
        _libc.setfsuid(0)
        _libc.setfsgid(0)
        for item in reversed(mount['entries']):
            _attributes(top, item)
        _remount(top, flags)


if __name__ == '__main__':
    main()
