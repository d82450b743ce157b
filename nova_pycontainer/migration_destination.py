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

"""Live migration: the destination's side."""

import time

from keystoneauth1 import exceptions as keystone_exceptions
from nova import exception
from nova.i18n import _
from nova import objects
from oslo_log import log as logging

from nova_pycontainer import cpus
from nova_pycontainer import migration_data
from nova_pycontainer import patience
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import versions
from nova_pycontainer import steps as driver_steps
from nova_pycontainer import vif

LOG = logging.getLogger(__name__)

#: Phases of the agent in which the server may run here, or does.
_HERE = ('committed', 'running', 'completed')

_ENDED = ('aborted', 'failed')

#: Seconds for the processes of one that has ended to be gone.
_DYING_S = 5

#: Glance does not have the image any more, or not for this user, or is not
#: there itself.
_NOT_FROM_GLANCE = (
    # Nobody's token, where no user asks: there is no catalog.
    keystone_exceptions.ClientException,
    exception.ImageNotFound, exception.ImageNotAuthorized,
    exception.CouldNotFetchImage, exception.GlanceConnectionFailed)

_ALIVE = ('running', 'paused')


class Destination:
    """Receives servers.

    :param client: client of the agent
    :param images: a nova_pycontainer.image.Images
    :param volumes: a nova_pycontainer.volume.Volumes
    :param conf: the options of ``[pycontainer]``
    """

    def __init__(self, client, images, volumes, conf):
        self._client = client
        self._volumes = volumes
        self._images = images
        self._conf = conf
        #: Migrations that were rolled back, maybe while they were prepared.
        self._over = set()

    def prepare(self, context, instance, network_info, block_device_info,
                disk_info, data):
        """Make all that the server needs here, and wait for its source.

        :param disk_info: what the source has said, see
            :func:`nova_pycontainer.migration_data.dump_disk_info`
        :returns: the object, with what the source needs
        :raises nova.exception.NovaException: nothing is left of it here
        :raises ContainerError: the same, of the agent's
        """
        uuid = instance.uuid
        migration = migration_data.get(data)['migration']
        facts = migration_data.load_disk_info(disk_info)
        source = migration_data.recorded_identity(context, instance.host)
        vifs = migration_data.destination_vifs(data, network_info)
        resources = {
            **facts['spec']['resources'], 'cpus': cpus.of_claimed(
                instance, data.dst_numa_info if 'dst_numa_info' in data
                else None)}
        with self._volumes.connecting(instance), driver_steps.Steps(
                'pre_live_migration', instance) as steps:
            with steps.step('leftovers'):
                self.remove_leftovers(instance)
            with steps.step('layer'):
                self.get_layer(context, instance, facts['spec'])
            with steps.step('volumes', lambda: self._volumes.disconnect_all(
                    block_device_info, instance)):
                volumes = _renewed(
                    self._volumes.connect_all(
                        context, block_device_info, instance, save=False),
                    facts['spec'].get('volumes') or [])
            with steps.step('network'):
                vifs = _in_order(vifs, facts['spec']['nics'])
                nics = vif.nics_of(instance, vifs, self._conf.tx_offload)
            with steps.step('plug', lambda: self._client.unplug(
                    uuid, [nic['devname'] for nic in nics])):
                self._client.plug(uuid, nics)
            with steps.step('plug_vifs', lambda: vif.unplug(instance, vifs)):
                # Neutron wires the ports from now on. The source waits for
                # its event before it begins.
                vif.plug(instance, vifs)
            with steps.step('prepare', lambda: self._client.delete(uuid)):
                endpoint = self._client.migration_prepare(
                    uuid, migration, {
                        **facts['spec'], 'base_id': facts['base_id'],
                        'nics': nics, 'volumes': volumes,
                        'resources': resources},
                    source, options(self._conf))
            with steps.step('rollback'):
                # The source's service was restarted, and waits no more.
                if migration in self._over:
                    raise exception.MigrationError(
                        reason=_('it was rolled back meanwhile'))
            steps.success()
        data.target_connect_addr = f'{endpoint["address"]}:{endpoint["port"]}'
        migration_data.put(data, migration=migration, endpoint={
            **versions.told(endpoint), **{key: endpoint[key] for key in (
                'address', 'port', 'fingerprint', 'protocol')}})
        return data

    def remove_leftovers(self, instance):
        """Remove what an earlier stay has left here.

        :raises nova.exception.MigrationError: it is alive
        """
        info = self._client.find(instance.uuid)
        if info is None:
            return
        state = info['state']
        if state in _ALIVE:
            raise exception.MigrationError(
                reason=_('its container is %s on the destination already. '
                         'Look at both hosts with "pycontainer list"') %
                state)
        # The source has the server, as Nova and its agent say.
        LOG.warning('Removing what is left here of an earlier stay (%s)',
                    state, instance=instance)
        self._client.delete(instance.uuid)

    def get_layer(self, context, instance, spec):
        """Have the image's layer here, if Glance still has the image.

        Its key names the data, so that a layer of that key is the right one
        whatever Glance has. Otherwise the agent gets it from the source's
        when that begins.

        :raises nova.exception.NovaException: the server may only run on
            what is signed, and that the image is cannot be shown
        """
        present = self._client.layer_present(spec['layer'])
        if present and not self._images.needs_verification(
                instance, spec['layer']):
            return
        try:
            meta = objects.ImageMeta.from_instance(instance)
            if self._images.key(context, meta.id) == spec['layer']:
                self._images.ensure(context, instance, meta)
                return
            reason = 'it has other data than the server was made of'
        except _NOT_FROM_GLANCE as e:
            reason = str(e)
        if present:
            # It was made of what had that name on this host.
            raise exception.MigrationError(
                reason=_('the signature of image %(image_id)s cannot be '
                         'verified on the destination: %(reason)s') %
                {'image_id': spec['image_id'], 'reason': reason})
        LOG.info('Image %s cannot be had from Glance (%s): its layer will '
                 'come from the source', spec['image_id'], reason,
                 instance=instance)

    def rollback(self, instance, network_info, data):
        """Remove what :meth:`prepare` has made; idempotent.

        :raises nova.exception.MigrationError: the server runs here, whatever
            the source may think
        """
        uuid = instance.uuid
        try:
            migration = migration_data.get(data)['migration']
        except (exception.MigrationError, KeyError):
            # It failed before it had a name.
            migration = None
        else:
            self._over.add(migration)
        # That the agent has died may be why.
        patience.call(self._client.find, uuid)
        self._give_up(instance, migration)
        other = self._of_another(instance, migration)
        if other is not None:
            LOG.warning('Migration %s is being rolled back late: what is here '
                        'is of %s', migration, other, instance=instance)
            return
        self._client.delete(uuid)
        vifs = migration_data.destination_vifs(data, network_info)
        vif.unplug(instance, vifs)
        self._client.unplug(uuid, [vif.name(port) for port in vifs or ()])

    def _give_up(self, instance, migration):
        """Have the agent end the migration, unless it cannot be ended.

        :param migration: its uuid, or None
        :raises nova.exception.MigrationError: it has ended well
        """
        here = False
        try:
            if migration is not None:
                status = self._client.migration_status(migration)
                if status['phase'] not in (*_ENDED, *_HERE):
                    self._client.migration_abort(
                        migration, 'the source has rolled back')
                    status = self._client.migration_status(migration)
                here = status['phase'] in _HERE
        except errors.ContainerError as e:
            if e.code == 'bad_state':
                here = True
            elif e.code != 'not_found':
                raise
        if here:
            raise _runs_here()

    def _of_another(self, instance, migration):
        """The later migration whose container is here, or None.

        :raises nova.exception.MigrationError: it has brought the server
        """
        for _attempt in range(_DYING_S):
            info = self._client.find(instance.uuid)
            if info is None:
                return None
            if info['migration'] not in (None, migration):
                return info['migration']
            if info['state'] not in _ALIVE:
                return None
            # Or this one has just been killed.
            time.sleep(1)
        raise _runs_here()


def _runs_here():
    return exception.MigrationError(
        reason=_('the server runs on the destination, which is therefore not '
                 'cleaned up. Look at both hosts with "pycontainer list"'))


def options(conf):
    """The options of ``[pycontainer]`` as the agent takes them."""
    bandwidth = conf.live_migration_bandwidth
    return {
        'permit_post_copy': conf.live_migration_permit_post_copy,
        'max_downtime': conf.live_migration_downtime / 1000,
        'bandwidth': bandwidth << 20 if bandwidth else None,
    }


def _in_order(vifs, nics):
    """The VIFs in the order of the guest's eth0, eth1 …

    The guest has them as they were when it started; Nova's list may have
    another order by now.
    """
    return _matched(_('ports'), vifs or (), nics)


def _renewed(volumes, told):
    """The volumes, as the guest knows them, with their devices on this host.

    :param volumes: of :meth:`nova_pycontainer.volume.Volumes.connect_all`
    """
    return [here | {'name': volume['name']} for here, volume in zip(
        _matched(_('volumes'), volumes, told), told, strict=True)]


def _matched(what, here, told):
    """Of what Nova has, in the order of the container's.

    :raises nova.exception.MigrationError: they are not the same
    """
    by_id = {item['id']: item for item in here}
    if set(by_id) != {item['id'] for item in told}:
        raise exception.MigrationError(
            reason=_('the %(what)s of the server (%(nova)s) are not those of '
                     'its container (%(container)s). A hard reboot makes '
                     'them so') %
            {'what': what, 'nova': ', '.join(by_id) or 'none',
             'container': ', '.join(item['id'] for item in told) or 'none'})
    return [by_id[item['id']] for item in told]
