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

"""Rescue: a container with another root, in which its own one is to be seen.

A root on a volume that cannot be mounted is to be seen as a device.

The other root has a layer and a scratch disk of its own
(``<instance>/rescue/``), and everything else of the container: its ids, its
limits and its interfaces. ``state.json`` says that it is being rescued, so
that every start of it is one of the other root, until the end.
"""

import dataclasses
import os
import pathlib
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import imagecheck
from nova_pycontainer.runtime import overlay
from nova_pycontainer.runtime import revert
from nova_pycontainer.runtime import spec as rspec
from nova_pycontainer.runtime import trees
from nova_pycontainer.runtime import volume

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

#: What of a specification the other root has its own of.
_OWN: ty.Final = ('layer', 'image_id', 'init')
_DIRECTORY: ty.Final = 'rescue'
#: Of the device of a root that cannot be mounted; Nova gives no other that.
_NAME: ty.Final = 'vda'


def check_not(item: container.Container) -> None:
    """:raises ContainerError: ``bad_state``: it is being rescued"""
    if item.st.rescue:
        raise errors.ContainerError(
            'bad_state', 'the instance is being rescued', uuid=item.uuid,
            remedy='Unrescue it first')


class Rescued(container.Container):
    """A container that is being rescued."""

    def __init__(self, *args: ty.Any) -> None:
        super().__init__(*args)
        assert self.st.rescue is not None
        self._own_layer = self.spec.layer
        self._own_disk = self.disk
        self._place = self.root.with_name(f'{self.uuid}.own')
        self.rescued = self._place
        #: Its own root, if that is a volume that cannot be mounted.
        self._device: volume.Volume | None = None
        self.spec = rspec.Spec.from_dict(
            {**self.st.spec, **self.st.rescue['spec']})
        self.scratch = self.directory / _DIRECTORY
        self.config_drive = self.scratch / 'config-drive'
        self.disk = disk.Disk(
            self.scratch, self.st.disk_method, self.st.base_id,
            self.spec.disk_bytes,
            # Its own disk may be full, which may be why it is rescued. Only
            # first ids of ranges are projects otherwise.
            project=self.st.base_id + 1)

    @property
    def layers(self) -> set[str]:
        return {self.spec.layer, self._own_layer} - {''}

    def make_scratch(
        self, config_drive: ty.Mapping[str, str] | None
    ) -> None:
        self.remove_scratch()
        self.scratch.mkdir(mode=0o700)
        self.disk.create()
        self.set_config_drive(config_drive)

    def remove_scratch(self) -> None:
        """Idempotent; the container is down."""
        self.disk.unmount()
        self.disk.clear_limit()
        if self.scratch.exists():
            trees.remove(self.scratch)

    def mount_root(self, layer: pathlib.Path) -> None:
        own = self._config.layers_dir / self._own_layer / 'root'
        if self._own_layer and not own.exists():
            raise errors.ContainerError(
                'layer_missing', 'the layer of the instance that is to be '
                'rescued is not on this host', uuid=self.uuid)
        self._own_disk.mount()
        self.root.parent.mkdir(mode=0o711, exist_ok=True)
        try:
            self._own_disk.show(self._place, own)
        except errors.ContainerError as e:
            if e.code != 'volume_unusable':
                raise
            # That may be why it is rescued: let the guest repair it.
            LOG.warning('instance %s: its own root is shown as a device: %s',
                        self.uuid, e)
            self._device = dataclasses.replace(
                volume.Volume.from_dict(self.st.spec['root']), name=_NAME)
            self.rescued = None
        super().mount_root(layer)

    def devices(self) -> tuple[volume.Volume, ...]:
        own = (self._device,) if self._device else ()
        return (*own, *super().devices())

    def unmount_root(self) -> None:
        super().unmount_root()
        overlay.unmount(self._place)
        self._own_disk.unmount()

    def remove_files(self) -> None:
        self.remove_scratch()
        self._own_disk.unmount()
        self._own_disk.clear_limit()
        super().remove_files()


class Rescues:
    """The verbs."""

    def __init__(self, owner: 'host.Host') -> None:
        self._host = owner

    def recover(self) -> None:
        """Remove what a killed agent has left of an end."""
        for entry in self._host.entries():
            item = entry.container
            try:
                if item.st.rescue is None and os.path.lexists(
                        item.directory / _DIRECTORY):
                    self._remove_scratch(item)
            except Exception:
                # One container must not keep the others from their agent.
                LOG.exception('instance %s: what is left of its rescue',
                              item.uuid)

    def _rescued(
        self, item: container.Container, own: dict[str, ty.Any]
    ) -> Rescued:
        made = self._host.make(dataclasses.replace(
            item.st, rescue={'spec': own}))
        assert isinstance(made, Rescued)
        return made

    def _remove_scratch(self, item: container.Container) -> None:
        made = self._rescued(item, {})
        try:
            made.remove_scratch()
        except OSError as e:
            # Only room is lost; the next rescue tries again.
            LOG.error('instance %s: %s is left behind: %s', item.uuid,
                      made.scratch, e)

    def begin(self, uuid: str, spec: dict[str, ty.Any]) -> dict[str, ty.Any]:
        """Give a container that is down another root, until the end.

        Repeated, it gives it yet another one.

        :param spec: ``layer``, ``image_id``, ``init`` and ``config_drive`` of
            the other root
        :raises ContainerError: ``bad_state``, ``layer_missing``,
            ``image_no_init``, ``no_space``, ``invalid``
        """
        drive = spec.get('config_drive')
        unknown = {*spec} - {*_OWN, 'config_drive'}
        if unknown:
            raise errors.ContainerError(
                'invalid', f'{sorted(unknown)} cannot be another one in a '
                'rescue')
        own = {name: spec.get(name) for name in _OWN} | {'root': None}
        key = rconfig.check_layer_key(own['layer'])
        # The layer may not be deleted before it is known to be in use.
        with self._host.layers.locked(key), self._host.locked(uuid) as entry:
            item = entry.container
            entry.require('defined', 'stopped')
            # What is still to come would come into the other root.
            item.check_here()
            self._host.snapshots.check_startable(uuid)
            layer = self._host.layers.require(key)
            made = self._rescued(item, own)
            imagecheck.check_init(layer.root, made.spec.init_argv)
            with revert.Reverter(uuid) as r:
                with r.step('rescue-scratch', made.remove_scratch):
                    made.make_scratch(drive)
                with r.step('rescue-state'):
                    made.st.save(made.directory)
                r.success()
            entry.container = made
            return made.info()

    def end(self, uuid: str) -> dict[str, ty.Any]:
        """Kill the container, and give it its own root again; idempotent."""
        self._host.kill(uuid)
        with self._host.locked(uuid) as entry:
            item = entry.container
            if not isinstance(item, Rescued):
                return item.info()
            entry.require('defined', 'stopped')
            st = dataclasses.replace(item.st, rescue=None)
            st.save(item.directory)
            entry.container = self._host.make(st)
            self._remove_scratch(entry.container)
            return entry.container.info()
