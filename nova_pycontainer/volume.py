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

"""Volumes: connected to the host by os-brick, given to the guest by the agent.

A volume is a device in the guest's ``/dev`` and no more: a guest has no right
to mount a file system of the host's kernel. Only its root may be one, which
the agent mounts.
"""

import contextlib
import threading

from nova import block_device
from nova import exception
from nova.i18n import _
from nova import utils
from nova.virt import driver
from os_brick import exception as brick_exception
from os_brick.initiator import connector
from oslo_concurrency import processutils
from oslo_log import log as logging

from nova_pycontainer import device_metadata
from nova_pycontainer import encryption
from nova_pycontainer import power
from nova_pycontainer.runtime import errors
from nova_pycontainer import steps

LOG = logging.getLogger(__name__)

#: No such device is in the guest.
_ROOT_NAME = 'vda'

_BRICK_ERRORS = (
    brick_exception.BrickException, processutils.ProcessExecutionError,
    OSError, ValueError)


class Volumes:
    """The volumes of one host's servers.

    :param client: client of the agent
    :param conf: nova.conf, with ``[pycontainer]``
    :param host: name of this compute service
    """

    def __init__(self, client, conf, host):
        self._client = client
        self._conf = conf
        self._host = host
        # Whether others have a device, and its end, are one thing.
        self._lock = threading.Lock()
        self._encryption = encryption.Encryption()
        # Connected for servers of which the agent does not know that yet:
        # (server, volume).
        self._coming = set()

    def properties(self):
        """What Cinder has to know of this host."""
        multipath = self._conf.pycontainer.volume_use_multipath
        return connector.get_connector_properties(
            utils.get_root_helper(), self._conf.my_block_storage_ip,
            multipath=multipath, enforce_multipath=True, host=self._host)

    def _connector(self, connection_info):
        kind = connection_info['driver_volume_type']
        try:
            return connector.InitiatorConnector.factory(
                kind, utils.get_root_helper(),
                use_multipath=self._conf.pycontainer.volume_use_multipath,
                conn=connection_info,
                # RBD: a device of the kernel's instead of a library's handle.
                do_local_attach=True)
        except brick_exception.InvalidConnectorProtocol as e:
            raise exception.VolumeDriverNotFound(driver_type=kind) from e

    # On this host

    def connect(self, context, connection_info, mountpoint, instance,
                encryption=None):
        """Have a volume's device on this host; idempotent.

        Until the end of :meth:`connecting` no other server's end takes it
        away.

        :param mountpoint: its name in the guest
        :param encryption: what Cinder says of that of the volume, if it is
            encrypted; None: Cinder is asked
        :returns: the volume, as the agent takes it
        :raises nova.exception.NovaException: it cannot be had
        """
        ident = volume_id(connection_info)
        data = connection_info.get('data') or {}
        try:
            with self._lock:
                self._coming.add((instance.uuid, ident))
                found = self._connector(connection_info).connect_volume(data)
        except _BRICK_ERRORS as e:
            raise exception.VolumeAttachFailed(
                volume_id=ident, reason=str(e)) from e
        path = found['path']
        if isinstance(path, bytes):
            path = path.decode()
        # What disconnects it later has to know it.
        data['device_path'] = path
        if found.get('multipath_id'):
            data['multipath_id'] = found['multipath_id']
        if data.get('encrypted') or encryption:
            self._encryption.open(
                context, ident, connection_info, encryption)
        return {'id': ident, 'name': block_device.strip_dev(mountpoint),
                'path': path, 'read_only': data.get('access_mode') == 'ro'}

    def disconnect(self, connection_info, instance, replaced=False):
        """End :meth:`connect`, whether or not it has been called.

        Not while another server of this host has the same volume.

        :param replaced: the server has another device of the same volume
        :raises nova.exception.VolumeDetachFailed: its device is here still
        :raises ContainerError: the agent's
        """
        ident = volume_id(connection_info)
        data = connection_info.get('data') or {}
        with self._lock:
            users = {uuid for uuid, volume in self._coming
                     if volume == ident}
            for info in self._client.list():
                if not any(v['id'] == ident for v in (
                        *info['volumes'], *filter(None, [info.get('root')]))):
                    continue
                # A copy that has left runs no more here.
                if info['uuid'] != instance.uuid and not (
                        info['moved'] or info.get('offered')):
                    users.add(info['uuid'])
                if info['uuid'] == instance.uuid and not replaced and (
                        info['state'] in (*power.ALIVE, power.UNKNOWN) and
                        not info['moved']):
                    # Its number could become that of another one's device,
                    # which the node here would open.
                    raise exception.VolumeDetachFailed(
                        volume_id=ident, reason=_('the server has it still'))
            users.discard(instance.uuid)
            if users:
                LOG.info('Volume %s stays connected for %s', ident,
                         ', '.join(users), instance=instance)
                return
            try:
                if data.get('encrypted'):
                    self._encryption.close(connection_info)
                self._connector(connection_info).disconnect_volume(
                    data, data, ignore_errors=False)
            except _BRICK_ERRORS as e:
                raise exception.VolumeDetachFailed(
                    volume_id=ident, reason=str(e)) from e

    @contextlib.contextmanager
    def connecting(self, instance):
        """In the body a server gets volumes, which the agent knows then."""
        try:
            yield
        finally:
            with self._lock:
                self._coming = {
                    (uuid, ident) for uuid, ident in self._coming
                    if uuid != instance.uuid}

    def connect_all(self, context, block_device_info, instance, save=True):
        """:meth:`connect` for all but its root, as the agent takes them.

        :param save: whether Nova's records are this host's to change
        """
        root = root_of(block_device_info)
        return [self._connect(context, v, v['mount_device'], instance, save)
                for v in driver.block_device_info_get_mapping(
                    block_device_info) if v is not root]

    def _connect(self, context, mapping, mountpoint, instance, save=True):
        found = self.connect(
            context, mapping['connection_info'], mountpoint, instance)
        if save:
            # Who disconnects it has to know it, also after nova-compute's
            # end.
            mapping.save()
        return found

    def connect_root(self, context, block_device_info, instance):
        """:meth:`connect` for the volume that a server's root is.

        :returns: None: its root is none
        :raises nova.exception.InvalidInput: it cannot be the root
        """
        root = root_of(block_device_info)
        if root is None:
            return None
        info = root['connection_info']
        if info.get('multiattach'):
            # Also with one server now: another one may come.
            raise exception.InvalidInput(
                reason=_('volume %s may be attached to several servers, and '
                         'a file system that two have mounted is lost. Boot '
                         'from a volume of another type') % volume_id(info))
        return self._connect(context, root, _ROOT_NAME, instance)

    def disconnect_all(self, block_device_info, instance):
        """:meth:`disconnect`; what fails is logged, and the rest done.

        The server has no use for them on this host any more, whatever becomes
        of their devices.
        """
        for volume in driver.block_device_info_get_mapping(block_device_info):
            try:
                self.disconnect(volume['connection_info'], instance)
            except (exception.NovaException, errors.ContainerError) as e:
                LOG.error('%s', e, instance=instance)

    # In a server

    def attach(self, context, connection_info, instance, mountpoint,
               encryption):
        """Give a server a volume.

        :raises nova.exception.NovaException: nothing is left of it
        :raises ContainerError: the same, of the agent's
        """
        with self.connecting(instance), steps.Steps(
                'attach_volume', instance) as made:
            with made.step('connect', lambda: self.disconnect(
                    connection_info, instance)):
                volume = self.connect(
                    context, connection_info, mountpoint, instance,
                    encryption)
            with made.step('attach', lambda: self._client.volume_detach(
                    instance.uuid, volume['id'])):
                self._client.volume_attach(instance.uuid, volume)
            with made.step('metadata'):
                device_metadata.renew(context, instance)
            made.success()

    def detach(self, connection_info, instance):
        """Take a volume away, also one that the server does not have here.

        :raises nova.exception.NovaException: its device is here still
        :raises ContainerError: the agent's; the server has it still
        """
        # After a migration that did not begin, the destination's share of it
        # is its device alone.
        if instance.host in (None, self._host):
            try:
                self._client.volume_detach(
                    instance.uuid, self._known_as(connection_info, instance))
            except errors.ContainerError as e:
                if e.code != 'not_found':
                    raise
        self.disconnect(connection_info, instance)

    def _known_as(self, connection_info, instance):
        """The id that the agent has of a volume.

        Cinder may have named it anew after it was put in another's place.
        """
        ident = volume_id(connection_info)
        path = (connection_info.get('data') or {}).get('device_path')
        known = {v['id']: v['path'] for v in
                 self._client.info(instance.uuid)['volumes']}
        if ident in known:
            return ident
        return next((other for other, of in known.items() if of == path),
                    ident)

    def extend(self, context, connection_info, instance):
        """Have the device know its new size; a guest's follows it.

        :raises nova.exception.NovaException: it has the old one
        """
        try:
            size = self._connector(connection_info).extend_volume(
                connection_info['data'])
            if connection_info['data'].get('encrypted'):
                self._encryption.extend(
                    context, volume_id(connection_info), connection_info)
        except NotImplementedError as e:
            raise exception.ExtendVolumeNotSupported() from e
        except _BRICK_ERRORS as e:
            raise exception.VolumeExtendFailed(
                volume_id=volume_id(connection_info), reason=str(e)) from e
        LOG.info('Volume %s has %s bytes now', volume_id(connection_info),
                 size, instance=instance)

    def usage(self, servers):
        """What the manager keeps of the use of volumes.

        :param servers: as ``get_all_volume_usage`` has them
        """
        infos = {info['uuid']: info for info in self._client.list()}
        found = []
        for server in servers:
            instance = server['instance']
            volumes = {
                v['id']: v['statistics'] for v in infos.get(
                    instance.uuid, {}).get('volumes', ())}
            for bdm in server['instance_bdms']:
                figures = volumes.get(bdm['volume_id'])
                if figures:
                    found.append({
                        'volume': bdm['volume_id'], 'instance': instance,
                        'rd_req': figures['read_requests'],
                        'rd_bytes': figures['read_bytes'],
                        'wr_req': figures['write_requests'],
                        'wr_bytes': figures['write_bytes']})
        return found


def volume_id(connection_info):
    return (connection_info.get('serial') or
            (connection_info.get('data') or {}).get('volume_id'))


def root_of(block_device_info):
    """The volume that a server's root is, as Nova has it, or None."""
    return next((
        volume for volume in driver.block_device_info_get_mapping(
            block_device_info) if volume.get('boot_index') == 0), None)
