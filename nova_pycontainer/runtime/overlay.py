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

"""The root file system: an idmapped, shared layer under an upper of one's own.
"""

import collections.abc as cabc
import contextlib
import os
import pathlib

from nova_pycontainer.runtime import idmap
from nova_pycontainer.runtime import syscalls


def mount(
    target: pathlib.Path,
    *,
    layer: pathlib.Path,
    upper: pathlib.Path,
    work: pathlib.Path,
    base_id: int,
) -> None:
    """Mount the root file system of a container at ``target``.

    The layer's files belong to the ids 0… on disk. An idmapped mount of it
    shows them to the overlay as the container's own, so that all containers
    share one copy in the page cache and nothing is ever chowned. The upper is
    not idmapped (the kernel refuses to write to an overlay with an idmapped
    upper): its files have host ids.

    :raises OSError: the kernel refused; its reason is in the text
    """
    with _lower(target, layer, base_id) as lower:
        _mount_overlay(
            target,
            ('lowerdir', str(lower)),
            ('upperdir', str(upper)),
            ('workdir', str(work)),
            # CRIU dumps inotify watches by file handle, and an overlay has
            # file handles only with both of these.
            ('index', 'on'),
            ('nfs_export', 'on'),
            # A redirect names a place of the layer, which a copy of the
            # upper by names does not know of.
            ('redirect_dir', 'off'))


def view(
    target: pathlib.Path,
    *,
    layer: pathlib.Path,
    upper: pathlib.Path,
    base_id: int,
) -> None:
    """Show at ``target`` what :func:`mount` would show, read-only.

    :param upper: a copy, without the index of the work directory: what is
        known only there has to be in it by name
    :raises OSError: the kernel refused; its reason is in the text
    """
    with _lower(target, layer, base_id) as lower:
        _mount_overlay(
            target, ('lowerdir', f'{upper}:{lower}'), ('redirect_dir', 'off'))


@contextlib.contextmanager
def _lower(
    target: pathlib.Path, layer: pathlib.Path, base_id: int
) -> cabc.Iterator[pathlib.Path]:
    """The idmapped mount of a layer, while the overlay is made."""
    lower = target.with_name(target.name + '.lower')
    lower.mkdir(mode=0o700, exist_ok=True)
    target.mkdir(mode=0o755, exist_ok=True)
    tree = syscalls.open_tree(
        str(layer), syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
    try:
        with idmap.userns_fd(base_id) as userns:
            syscalls.mount_setattr(
                tree, userns_fd=userns,
                attr_set=(syscalls.MOUNT_ATTR_IDMAP |
                          syscalls.MOUNT_ATTR_RDONLY))
        # Overlayfs clones its layers' mounts, and before Linux 6.15 a
        # detached mount cannot be cloned: attach it for that moment.
        syscalls.move_mount(tree, str(lower))
    finally:
        os.close(tree)
    try:
        yield lower
    finally:
        syscalls.umount(str(lower), syscalls.MNT_DETACH)
        lower.rmdir()


def _mount_overlay(target: pathlib.Path, *options: tuple[str, str]) -> None:
    context = syscalls.fsopen('overlay')
    try:
        syscalls.fsconfig_string(context, 'source', 'pycontainer')
        for key, value in options:
            syscalls.fsconfig_string(context, key, value)
        with _without_sys_resource():
            syscalls.fsconfig_create(context)
        root = syscalls.fsmount(context, syscalls.MOUNT_ATTR_NODEV)
    finally:
        os.close(context)
    try:
        syscalls.mount_setattr(root, propagation=syscalls.MS_PRIVATE)
        syscalls.move_mount(root, str(target))
    finally:
        os.close(root)


@contextlib.contextmanager
def _without_sys_resource() -> cabc.Iterator[None]:
    """Make the superblock without CAP_SYS_RESOURCE.

    Overlayfs writes to the upper with the credentials of whoever mounted it,
    whatever process of the container writes; and ext4 lets a holder of
    CAP_SYS_RESOURCE exceed a quota. Mounted with it, no project quota would
    ever hold.
    """
    had = syscalls.set_effective(syscalls.CAP_SYS_RESOURCE, False)
    try:
        yield
    finally:
        if had:
            syscalls.set_effective(syscalls.CAP_SYS_RESOURCE, True)


def bind(source: pathlib.Path, target: pathlib.Path) -> None:
    """Show the directory ``source`` at ``target``, read-only.

    For what a process in the container's user namespace has to open by its
    path while it restores the container's mounts: it cannot pass through the
    directories of the state, which are root's alone.
    """
    target.mkdir(mode=0o755, exist_ok=True)
    tree = syscalls.open_tree(
        str(source), syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
    try:
        syscalls.mount_setattr(
            tree, propagation=syscalls.MS_PRIVATE,
            attr_set=(syscalls.MOUNT_ATTR_RDONLY |
                      syscalls.MOUNT_ATTR_NOSUID |
                      syscalls.MOUNT_ATTR_NODEV))
        syscalls.move_mount(tree, str(target))
    finally:
        os.close(tree)


def unmount(target: pathlib.Path) -> None:
    """Unmount what :func:`mount` or :func:`bind` made; idempotent.

    A plain unmount, never a lazy one at first: with a lazy one the upper's
    file system would stay busy behind our back.
    """
    for path in (target.with_name(target.name + '.lower'), target):
        if not path.exists():
            continue
        while os.path.ismount(path):
            syscalls.umount(str(path), syscalls.UMOUNT_NOFOLLOW)
        # An end of the guest, and whoever waits for it, may clean up at once.
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
