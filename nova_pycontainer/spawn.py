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

"""Make a container of an image, and remove one."""

import contextlib
import threading

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt import configdrive as nova_configdrive
from oslo_log import log as logging

from nova_pycontainer import configdrive
from nova_pycontainer import device_metadata
from nova_pycontainer import flavor
from nova_pycontainer import injection
from nova_pycontainer.runtime import errors
from nova_pycontainer import steps as driver_steps
from nova_pycontainer import vif
from nova_pycontainer import volume

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

#: Key of ``instance.system_metadata``: first host id of the container's user
#: namespace. It belongs to the root disk and goes with it to other hosts.
BASE_ID = 'pycontainer_base_id'


class Spawner:
    """Makes containers.

    :param client: client of the agent
    :param images: a nova_pycontainer.image.Images
    :param virtapi: the compute manager's, for waiting for events
    :param volumes: a nova_pycontainer.volume.Volumes
    :param conf: the options of ``[pycontainer]``
    """

    def __init__(self, client, images, virtapi, volumes, conf):
        self._client = client
        self._volumes = volumes
        self._images = images
        self._virtapi = virtapi
        self._conf = conf
        # Containers that could not be removed because the agent was gone:
        # uuid → names of their interfaces.
        self._leftovers = {}
        self._leftovers_lock = threading.Lock()

    def spawn(self, context, instance, image_meta, injected_files,
              admin_password, network_info, block_device_info, power_on):
        """Make the container and, if ``power_on``, start it.

        :raises nova.exception.NovaException: the request cannot be met
        :raises ContainerError: the agent's
        """
        booted = volume.root_of(block_device_info) is not None
        uuid = instance.uuid
        pids_max = self._conf.pids_max
        self.remove_leftovers([uuid])
        found = self._client.find(uuid)
        if found is not None and found.get('moved'):
            LOG.warning('Removing what is left here of an earlier stay',
                        instance=instance)
            self._client.delete(uuid)
        with self._volumes.connecting(instance), \
                contextlib.ExitStack() as waiting, \
                driver_steps.Steps('spawn', instance) as steps:
            with steps.step('check'):
                # What the request gets wrong must not cost a download.
                flavor.specification(
                    instance, layer=None, nics=[], pids_max=pids_max)
            with steps.step('image'):
                layer = None if booted else self._images.ensure(
                    context, instance, image_meta)
            with steps.step('volumes', lambda: self._volumes.disconnect_all(
                    block_device_info, instance)):
                volumes = self._volumes.connect_all(
                    context, block_device_info, instance)
                root = self._volumes.connect_root(
                    context, block_device_info, instance)
            with steps.step('network'):
                # Neutron works on the ports since before this method was
                # called; the first look at them waits for it.
                nics = vif.nics_of(
                    instance, network_info, self._conf.tx_offload)
            with steps.step('plug', lambda: self._unplug(uuid, nics)):
                self._client.plug(uuid, nics)
            if power_on:
                waiting.enter_context(self._plugged(instance, network_info))
            with steps.step('plug_vifs',
                            lambda: vif.unplug(instance, network_info)):
                vif.plug(instance, network_info)
            with steps.step('config_drive'):
                # The compute manager saves it with the instance.
                instance.device_metadata = device_metadata.build(
                    context, instance)
                nova_configdrive.update_instance(instance)
                drive = configdrive.files(
                    instance, injected_files, admin_password, network_info)
            with steps.step('define', lambda: self._undefine(instance, nics)):
                with self._unusable_removed(layer):
                    info = self._client.define(uuid, flavor.specification(
                        instance, layer=layer, nics=nics, pids_max=pids_max,
                        config_drive=drive, volumes=volumes, root=root,
                        files=injection.files(
                            instance, injected_files, network_info)))
                # The compute manager saves it with the instance.
                instance.system_metadata[BASE_ID] = str(info['base_id'])
            if power_on:
                with steps.step('prepare'):
                    self._client.prepare(uuid, None)
                with steps.step('vif_wait'):
                    waiting.close()
                with steps.step('start'):
                    self._client.start_container(uuid)
            steps.success()

    @contextlib.contextmanager
    def _unusable_removed(self, layer):
        """Keep no layer that nothing can be started from.

        Whether there is an init is known when the layer is there, because
        the image's properties may name another one.
        """
        try:
            yield
        except errors.ContainerError as e:
            if e.code in ('image_no_init', 'image_wrong_arch'):
                try:
                    self._client.layer_delete(layer)
                except errors.ContainerError as failure:
                    # A server that names its own init may use it.
                    LOG.info('Layer %s stays: %s', layer, failure)
            raise

    @contextlib.contextmanager
    def _plugged(self, instance, network_info):
        """Wait at the end of the body until Neutron has wired the ports.

        A guest that asks for its address before that goes without for long.
        """
        timeout = CONF.vif_plugging_timeout
        events = vif.events_to_wait_for(network_info) if timeout else []
        try:
            with self._virtapi.wait_for_instance_event(
                    instance, events, timeout=timeout,
                    error_callback=_neutron_failed):
                yield
        except exception.InstanceEventTimeout as e:
            # Nova has logged which ports.
            if CONF.vif_plugging_is_fatal:
                raise exception.VirtualInterfaceCreateException(
                    _('Neutron did not report the ports as plugged within '
                      '%d s ([DEFAULT]vif_plugging_timeout). See whether its '
                      'agent on this host is alive') % timeout) from e

    def _unplug(self, uuid, nics):
        with self._remembering(uuid, nics):
            self._client.unplug(uuid, _names(nics))

    def _undefine(self, instance, nics):
        instance.system_metadata.pop(BASE_ID, None)
        with self._remembering(instance.uuid, nics):
            self._client.delete(instance.uuid)

    @contextlib.contextmanager
    def _remembering(self, uuid, nics):
        try:
            yield
        except errors.AgentUnavailable:
            with self._leftovers_lock:
                self._leftovers[uuid] = _names(nics)
            raise

    def attach_interface(self, context, instance, port):
        """Give the server one more interface.

        :raises ContainerError: the agent's; nothing of it is left
        """
        nic = vif.nic(port, self._conf.tx_offload,
                      flavor.bandwidth(instance.flavor))
        with driver_steps.Steps('attach', instance) as steps:
            with steps.step('plug', lambda: self._client.unplug(
                    instance.uuid, [nic['devname']])):
                self._client.plug(instance.uuid, [nic])
            with steps.step('plug_vifs',
                            lambda: vif.unplug(instance, [port])):
                vif.plug(instance, [port])
            with steps.step('attach', lambda: self._client.interface_detach(
                    instance.uuid, nic['devname'])):
                self._client.interface_attach(instance.uuid, nic)
            with steps.step('metadata'):
                device_metadata.renew(context, instance)
            steps.success()

    def detach_interface(self, instance, port):
        """Take an interface away, whether or not it is there.

        :raises ContainerError: the agent's; it is there still
        """
        try:
            self._client.interface_detach(instance.uuid, vif.name(port))
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
        vif.unplug(instance, [port])

    def remove(self, instance, network_info, block_device_info=None, *,
               keep_disk=False, unplug=True):
        """Remove the container, whatever there is of it.

        :raises ContainerError: the agent's; then nothing may be said to be
            gone
        """
        self._client.delete(instance.uuid, keep_disk=keep_disk)
        if unplug:
            self.unplug(instance, network_info)
        self._volumes.disconnect_all(block_device_info, instance)

    def plug(self, instance, network_info):
        """Make and connect the interfaces, those of them that are not there.
        """
        self._client.plug(instance.uuid, vif.nics_of(
            instance, network_info, self._conf.tx_offload))
        vif.plug(instance, network_info)

    def unplug(self, instance, network_info):
        """Disconnect and remove the interfaces, whether or not there."""
        vif.unplug(instance, network_info)
        self._client.unplug(
            instance.uuid, [vif.name(port) for port in network_info or ()])

    def remove_leftovers(self, uuids=None):
        """Remove what failed spawns had to leave behind.

        Called when the agent answers again: a container that Nova has
        forgotten, or builds elsewhere, must not stay. A new spawn of the same
        server calls it too, so that it can never remove the new container.

        :param uuids: only these; None for all
        """
        with self._leftovers_lock:
            for uuid in list(self._leftovers if uuids is None else uuids):
                if uuid not in self._leftovers:
                    continue
                self._client.delete(uuid)
                self._client.unplug(uuid, self._leftovers[uuid])
                del self._leftovers[uuid]
                LOG.info('Removed what a failed spawn had left of container '
                         '%s', uuid)


def _names(nics):
    return [nic['devname'] for nic in nics]


def _neutron_failed(event_name, instance):
    LOG.error('Neutron reported a failure: %s', event_name, instance=instance)
    if CONF.vif_plugging_is_fatal:
        raise exception.VirtualInterfaceCreateException()
