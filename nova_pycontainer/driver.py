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

"""The compute driver: Nova's words in, the agent's verbs out.

It holds no state that cannot be read from the agent again, and it needs no
privilege. Each subject has a module of its own; here they are only put
together.
"""

import functools
import time

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.virt import driver
from nova.virt import hardware
from nova.virt import node
from oslo_concurrency import processutils
from oslo_log import log as logging

from nova_pycontainer.agent import client as agent_client
from nova_pycontainer import arrival
from nova_pycontainer import conf as driver_conf
from nova_pycontainer import console
from nova_pycontainer import cpus
from nova_pycontainer import diagnostics
from nova_pycontainer import errors as driver_errors
from nova_pycontainer import events
from nova_pycontainer import guest
from nova_pycontainer import handover
from nova_pycontainer import host as driver_host
from nova_pycontainer import image
from nova_pycontainer import imagecache
from nova_pycontainer import migration
from nova_pycontainer import migration_checks
from nova_pycontainer import migration_destination
from nova_pycontainer import migration_recovery
from nova_pycontainer import power
from nova_pycontainer import replug
from nova_pycontainer import rescue
from nova_pycontainer import resize
from nova_pycontainer import resize_recovery
from nova_pycontainer.runtime import errors
from nova_pycontainer import snapshot
from nova_pycontainer import spawn
from nova_pycontainer import stale
from nova_pycontainer import suspend_recovery
from nova_pycontainer import volume
from nova_pycontainer import volume_swap

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

driver_conf.register(CONF)

#: Seconds between two attempts to reach the agent while nova-compute starts.
_RETRY_S = 1.0

#: Limit for the program ``uptime``, in seconds.
_UPTIME_TIMEOUT_S = 10


def _periodic(method):
    """For what the compute manager's periodic tasks call.

    They skip their turn on VirtDriverNotReady and log a traceback, or worse,
    on everything else.
    """
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except errors.AgentUnavailable as e:
            raise driver_errors.unavailable(e) from e
        except errors.ContainerError as e:
            raise driver_errors.to_nova(e) from e
    return wrapper


class PyContainerDriver(driver.ComputeDriver):
    """System containers, made by the pycontainer agent of this host."""

    capabilities = {
        **driver.ComputeDriver.capabilities,
        'has_imagecache': True,
        'supports_attach_interface': True,
        'supports_bfv_rescue': True,
        'supports_device_tagging': True,
        'supports_evacuate': True,
        'supports_extend_volume': True,
        'supports_image_type_raw': True,
        'supports_multiattach': True,
        'supports_pcpus': True,
        'supports_tagged_attach_interface': True,
        'supports_tagged_attach_volume': True,
        'supports_trusted_certs': True,
    }

    def __init__(self, virtapi):
        super().__init__(virtapi)
        self._client = None

    # Start and end of the service.

    def _agent_client(self, host):
        """Return the client of the agent of a host.

        Functional tests, which run several hosts in one process, override
        it and :meth:`_node_uuid`.
        """
        return agent_client.Client(
            CONF.pycontainer.agent_socket, CONF.pycontainer.agent_timeout,
            CONF.pycontainer.agent_lost_timeout)

    def _node_uuid(self, host):
        return node.get_local_node_uuid()

    def init_host(self, host):
        # Several computes may share one CONF in a test process, so what
        # belongs to the host is read here, once.
        cpus.check_configuration()
        self._resources = None
        self._client = self._agent_client(host)
        self._wait_for_agent()
        options = CONF.pycontainer
        self._host = driver_host.Host(
            self._client, CONF, host, self._node_uuid(host), CONF.my_ip)
        self._images = image.Images(
            self._client, options.image_import_timeout)
        self._image_cache = imagecache.ImageCache(
            self._client, CONF.image_cache)
        self._volumes = volume.Volumes(self._client, CONF, host)
        self._volume_swapper = volume_swap.Swapper(
            self._client, self._volumes)
        self._spawner = spawn.Spawner(
            self._client, self._images, self.virtapi, self._volumes, options)
        self._snapshotter = snapshot.Snapshotter(self._client)
        self._migration_checks = migration_checks.Checks(self._client)
        self._migration_source = migration.Source(
            self._client, options, host, self.virtapi)
        self._migration_recovery = migration_recovery.Recovery(
            self._migration_source, self.virtapi, host)
        self._migration_destination = migration_destination.Destination(
            self._client, self._images, self._volumes, options)
        arrivals = arrival.Arrivals(
            self._client, self._migration_destination, options, host)
        self._power = power.Power(
            self._client, self._volumes, arrivals, options)
        self._rescuer = rescue.Rescuer(
            self._client, self._images, self._power)
        self._resizer = resize.Resizer(
            self._client, self._spawner, self._power, arrivals,
            self._volumes, options, host)
        self._suspend_recovery = suspend_recovery.Recovery(self._client)
        self._resize_recovery = resize_recovery.Recovery(
            self.virtapi, arrivals, host)
        self._watcher = events.Watcher(
            self._client, self._emit, self._agent_up, self._agent_down,
            patience=options.agent_lost_timeout,
            on_reboot=lambda uuid: replug.begin(self._client, uuid))

    def process_instances_at_startup(self, context, instances):
        self._suspend_recovery.settle(instances)
        instances = self._migration_recovery.keep_back(context, instances)
        return self._resize_recovery.keep_back(context, instances)

    def _wait_for_agent(self):
        """:raises nova.exception.HypervisorUnavailable: it does not answer,
            or refuses to
        """
        limit = CONF.pycontainer.agent_start_timeout
        deadline = time.monotonic() + limit
        while True:
            try:
                info = self._client.host_info()
            except errors.ContainerError as e:
                if time.monotonic() >= deadline or not isinstance(
                        e, errors.AgentUnavailable):
                    LOG.error('%s. nova-compute does not start without the '
                              'agent (waited at most %d s)', e, limit)
                    raise exception.HypervisorUnavailable(str(e)) from e
                LOG.warning('Waiting for the pycontainer agent: %s', e)
                time.sleep(_RETRY_S)
            else:
                LOG.info('The pycontainer agent answers: %s', info)
                return

    def cleanup_host(self, host):
        # Containers run on. Nothing waits for the thread: its request to the
        # agent may last half a minute, and it is a daemon's.
        self._watcher.stop()

    def _emit(self, event):
        # The manager would have a server powered off that it is about to
        # start, because its host has lost its power.
        if self._migration_recovery.has(event.uuid):
            return
        self.emit_event(event)

    def _agent_up(self):
        self._remove_leftovers()
        return self._host.set_enabled(self.virtapi, True)

    def _remove_leftovers(self):
        try:
            self._spawner.remove_leftovers()
        except errors.ContainerError as e:
            # No reason to call the agent lost; the next update tries again.
            LOG.warning('What a failed spawn has left could not be removed: '
                        '%s', e)

    def _agent_down(self, error):
        return self._host.set_enabled(
            self.virtapi, False, reason=str(error))

    # The host.

    def get_available_nodes(self, refresh=False):
        # As below. The rollback of a live migration would end in an error.
        return [self._host.name]

    def get_nodenames_by_uuid(self, refresh=False):
        self._check_agent()
        return {self._host.node_uuid: self._host.name}

    def node_is_available(self, nodename):
        # The node is this service's with or without its agent. The resource
        # tracker asks in the middle of operations, where no answer would make
        # more of them fail than have to.
        return nodename == self._host.name

    def _check_agent(self):
        """:raises nova.exception.VirtDriverNotReady: the agent is gone."""
        if self._watcher.failure is not None:
            raise driver_errors.unavailable(self._watcher.failure)

    @_periodic
    def get_available_resource(self, nodename):
        # The first call comes when the manager has looked at every instance
        # after its start (pre_start_hook). Before that an event could stop a
        # guest that the manager is about to resume after a host's boot.
        self._watcher.start()
        self._remove_leftovers()
        try:
            self._resources = self._host.resources(self.get_host_uptime())
        except errors.AgentUnavailable as e:
            if self._resources is None:
                raise
            # The service is disabled, if that lasts.
            LOG.warning('What there is of resources stays as it was: %s', e)
        return dict(self._resources)

    @_periodic
    def update_provider_tree(self, provider_tree, nodename, allocations=None):
        # The resource tracker asks for this last, under its lock, so at the
        # first call it is about to be ready for what these do to it. When it
        # asks for the resources it knows of no devices yet.
        self._migration_recovery.start()
        self._resize_recovery.start()
        self._suspend_recovery.start()
        try:
            self._host.update_provider_tree(
                provider_tree, nodename,
                self._get_allocation_ratios(
                    provider_tree.data(nodename).inventory),
                self._get_reserved_host_disk_gb_from_config())
        except errors.AgentUnavailable as e:
            # Also asked for when a claim is dropped, as at the end of a
            # migration. The next update sets right what has changed.
            LOG.warning('The inventory stays as it was: %s', e)

    def get_host_ip_addr(self):
        return self._host.ip

    def get_host_uptime(self):
        out, _err = processutils.execute(
            'env', 'LANG=C', 'uptime', timeout=_UPTIME_TIMEOUT_S)
        return out

    # What is there.

    @_periodic
    def list_instances(self):
        return [info['name'] for info in self._guests()]

    @_periodic
    def list_instance_uuids(self):
        return [info['uuid'] for info in self._guests()]

    def _guests(self):
        # What destroy() has left for a revert is files, and no guest.
        return [info for info in self._client.list() if not info.get('kept')]

    def instance_exists(self, instance):
        with driver_errors.translated(instance):
            info = self._client.find(instance.uuid)
        # What has moved and could not be removed is no server.
        return info is not None and not info.get('moved')

    def get_info(self, instance, use_cache=True):
        with driver_errors.translated(instance):
            return hardware.InstanceInfo(state=self._power.state(instance))

    def get_console_output(self, context, instance):
        with driver_errors.translated(instance):
            return console.output(self._client, instance)

    def get_serial_console(self, context, instance):
        with driver_errors.translated(instance):
            return console.serial(
                self._client, instance, CONF.serial_console)

    # Making and removing.

    def spawn(self, context, instance, image_meta, injected_files,
              admin_password, allocations, network_info=None,
              block_device_info=None, power_on=True, accel_info=None):
        with driver_errors.translated(instance, image_id=instance.image_ref):
            self._spawner.spawn(
                context, instance, image_meta, injected_files,
                admin_password, network_info, block_device_info, power_on)
            arrival.is_made_anew(context, instance)

    def destroy(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, destroy_secrets=True):
        if instance.task_state == task_states.RESIZE_REVERTING:
            if self._resizer.stays(context, instance):
                with driver_errors.translated(
                        instance,
                        failure=exception.InstanceTerminationFailure):
                    self._resizer.shut_down(
                        instance, network_info, block_device_info)
                return
            arrival.goes_back(instance)
        if destroy_disks:
            self._migration_source.deleted(context, instance)
        self.cleanup(context, instance, network_info, block_device_info,
                     destroy_disks)

    def cleanup(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, migrate_data=None, destroy_vifs=True,
                destroy_secrets=True):
        with driver_errors.after_the_move(instance) if migrate_data else (
                driver_errors.translated(
                    instance, failure=exception.InstanceTerminationFailure)):
            # Of what has moved. Whatever Nova's records say: a server that
            # runs here is not removed.
            if migrate_data and self._migration_source.is_here(instance):
                return
            self._spawner.remove(
                instance, network_info, block_device_info,
                keep_disk=not destroy_disks,
                unplug=destroy_vifs)

    def delete_instance_files(self, instance):
        try:
            self._client.delete(instance.uuid)
        except errors.ContainerError as e:
            # The manager asks again.
            LOG.warning('The files of the server could not be removed: %s',
                        e, instance=instance)
            return False
        return True

    # Power.

    def power_on(self, context, instance, network_info,
                 block_device_info=None, accel_info=None, share_info=None):
        with driver_errors.translated(
                instance, image_id=instance.image_ref,
                failure=exception.InstancePowerOnFailure):
            self._power.on(
                context, instance, network_info, block_device_info)

    def power_off(self, instance, timeout=0, retry_interval=0):
        with driver_errors.translated(
                instance, failure=exception.InstancePowerOffFailure):
            self._power.off(instance, timeout)

    def reboot(self, context, instance, network_info, reboot_type,
               block_device_info=None, bad_volumes_callback=None,
               accel_info=None, share_info=None):
        timeout = (CONF.pycontainer.soft_reboot_timeout
                   if reboot_type == 'SOFT' else 0)
        with driver_errors.translated(
                instance, image_id=instance.image_ref,
                failure=exception.InstanceRebootFailure):
            self._power.reboot(
                context, instance, network_info, block_device_info, timeout)

    def poll_rebooting_instances(self, timeout, instances):
        # A reboot is over when reboot() returns, and never hangs: every step
        # of it has a limit.
        pass

    def resume_state_on_host_boot(self, context, instance, network_info,
                                  share_info, block_device_info=None):
        # The order of the arguments is the manager's, who passes them by
        # position.
        with driver_errors.translated(
                instance, image_id=instance.image_ref,
                failure=exception.InstancePowerOnFailure):
            self._power.resume(
                context, instance, network_info, block_device_info)

    def pause(self, instance):
        if stale.given_up(instance):
            return
        with driver_errors.translated(
                instance, failure=exception.InstanceSuspendFailure):
            self._client.pause(instance.uuid)

    def unpause(self, instance):
        if stale.given_up(instance):
            return
        with driver_errors.translated(
                instance, failure=exception.InstanceResumeFailure):
            self._client.unpause(instance.uuid)

    def suspend(self, context, instance):
        if stale.given_up(instance):
            return
        with driver_errors.rolled_back(
                instance, exception.InstanceSuspendFailure):
            self._power.suspend(instance)

    def resume(self, context, instance, network_info,
               block_device_info=None, share_info=None):
        if stale.given_up(instance):
            return
        self._suspend_recovery.asked(instance)
        with driver_errors.rolled_back(
                instance, exception.InstanceResumeFailure):
            self._power.restore(
                context, instance, network_info, block_device_info)

    def quiesce(self, context, instance, image_meta):
        with driver_errors.translated(instance, failure=snapshot.failure):
            self._client.quiesce(
                instance.uuid, CONF.pycontainer.quiesce_timeout)

    def unquiesce(self, context, instance, image_meta):
        with driver_errors.translated(instance, failure=snapshot.failure):
            self._client.unquiesce(instance.uuid)

    def rescue(self, context, instance, network_info, image_meta,
               rescue_password, block_device_info, share_info):
        with driver_errors.translated(
                instance, image_id=image_meta.id, failure=rescue.failure):
            self._rescuer.rescue(
                context, instance, network_info, image_meta, rescue_password,
                block_device_info)

    def unrescue(self, context, instance):
        with driver_errors.translated(instance, failure=rescue.failure):
            self._rescuer.unrescue(context, instance)

    # In the guest, and about it.

    def set_admin_password(self, instance, new_pass):
        with driver_errors.translated(
                instance, failure=functools.partial(
                    exception.InstancePasswordSetFailed,
                    instance=instance.uuid)):
            guest.set_admin_password(self._client, instance, new_pass)

    def get_diagnostics(self, instance):
        with driver_errors.translated(instance):
            return diagnostics.diagnostics(self._client.info(instance.uuid))

    def get_instance_diagnostics(self, instance):
        with driver_errors.translated(instance):
            return diagnostics.instance_diagnostics(
                instance, self._client.info(instance.uuid))

    # Images.

    @_periodic
    def manage_image_cache(self, context, all_instances):
        self._resizer.forget(context)
        self._image_cache.manage()

    def cache_image(self, context, image_id):
        with driver_errors.translated(image_id=image_id):
            return self._images.cache(context, image_id)

    def snapshot(self, context, instance, image_id, update_task_state):
        with driver_errors.translated(instance, failure=snapshot.failure):
            self._snapshotter.snapshot(
                context, instance, image_id, update_task_state)

    # Network.

    def plug_vifs(self, instance, network_info):
        with driver_errors.translated(
                instance, failure=driver_errors.plug_failure):
            self._spawner.plug(instance, network_info)

    def unplug_vifs(self, instance, network_info):
        with driver_errors.translated(
                instance, failure=exception.VirtualInterfaceUnplugException):
            self._spawner.unplug(instance, network_info)

    def attach_interface(self, context, instance, image_meta, vif):
        with driver_errors.translated(
                instance, failure=driver_errors.attach_failure(instance)):
            self._spawner.attach_interface(context, instance, vif)

    def detach_interface(self, context, instance, vif):
        with driver_errors.translated(
                instance, failure=driver_errors.detach_failure(instance)):
            self._spawner.detach_interface(instance, vif)

    # Volumes.

    def get_volume_connector(self, instance):
        return self._volumes.properties()

    def default_root_device_name(self, instance, image_meta, root_bdm):
        # No such device is in the guest; the names of volumes follow it.
        return '/dev/vda'

    def attach_volume(self, context, connection_info, instance, mountpoint,
                      disk_bus=None, device_type=None, encryption=None):
        with driver_errors.translated(instance, failure=functools.partial(
                exception.VolumeAttachFailed,
                volume_id=volume.volume_id(connection_info))):
            self._volumes.attach(
                context, connection_info, instance, mountpoint, encryption)

    def detach_volume(self, context, connection_info, instance, mountpoint,
                      encryption=None):
        with driver_errors.translated(instance, failure=functools.partial(
                exception.DeviceDetachFailed, device=mountpoint)):
            self._volumes.detach(connection_info, instance)

    def swap_volume(self, context, old_connection_info, new_connection_info,
                    instance, mountpoint, resize_to):
        with driver_errors.translated(
                instance, failure=volume_swap.failure):
            self._volume_swapper.swap(
                context, old_connection_info, new_connection_info, instance,
                mountpoint)

    def extend_volume(self, context, connection_info, instance,
                      requested_size):
        self._volumes.extend(context, connection_info, instance)

    @_periodic
    def get_all_volume_usage(self, context, compute_host_bdms):
        return self._volumes.usage(compute_host_bdms)

    # Cold migration and resize, in the order of the calls. D is called on the
    # destination, S on the source.

    def migrate_disk_and_power_off(  # S
            self, context, instance, dest, flavor, network_info,
            block_device_info=None, timeout=0, retry_interval=0):
        with driver_errors.translated(
                instance, failure=exception.ResizeError):
            return self._resizer.leave(
                context, instance, flavor, network_info, block_device_info,
                timeout)

    def finish_migration(  # D
            self, context, migration, instance, disk_info, network_info,
            image_meta, resize_instance, allocations,
            block_device_info=None, power_on=True, share_info=None):
        with driver_errors.translated(
                instance, image_id=instance.image_ref,
                failure=exception.MigrationError):
            self._resizer.arrive(
                context, instance, migration, disk_info, network_info,
                block_device_info, power_on)

    def confirm_migration(  # S
            self, context, migration, instance, network_info):
        with driver_errors.translated(
                instance, failure=exception.InstanceTerminationFailure):
            self._resizer.confirm(instance, network_info, migration)

    def finish_revert_migration(  # S
            self, context, instance, network_info, migration,
            block_device_info=None, power_on=True, share_info=None):
        with driver_errors.translated(
                instance, image_id=instance.image_ref,
                failure=exception.InstancePowerOnFailure):
            self._resizer.revert(
                context, instance, network_info, block_device_info, power_on)

    # Live migration, in the order of the calls. D is called on the
    # destination, S on the source.

    def check_can_live_migrate_destination(  # D
            self, context, instance, src_compute_info, dst_compute_info,
            block_migration=False, disk_over_commit=False):
        return self._migration_checks.destination(
            context, instance, src_compute_info, dst_compute_info,
            block_migration, disk_over_commit)

    def check_can_live_migrate_source(  # S
            self, context, instance, dest_check_data,
            block_device_info=None):
        return self._migration_checks.source(
            instance, dest_check_data)

    def post_claim_migrate_data(  # D
            self, context, instance, migrate_data, claim):
        return self._migration_checks.claimed(migrate_data, claim)

    def check_source_migrate_data_at_dest(  # D
            self, ctxt, instance, migrate_data, migration, limits, allocs):
        return self._migration_checks.outcome(
            ctxt, instance, migrate_data, migration)

    def cleanup_live_migration_destination_check(  # D
            self, context, dest_check_data):
        # The checks make nothing. Nova asks for it even so.
        pass

    def get_instance_disk_info(  # S
            self, instance, block_device_info=None):
        with driver_errors.translated(
                instance, failure=exception.MigrationError):
            return self._migration_source.disk_info(instance)

    def pre_live_migration(  # D
            self, context, instance, block_device_info, network_info,
            disk_info, migrate_data):
        with driver_errors.translated(
                instance, image_id=instance.image_ref,
                failure=exception.MigrationError):
            return self._migration_destination.prepare(
                context, instance, network_info, block_device_info, disk_info,
                migrate_data)

    def live_migration(  # S
            self, context, instance, dest, post_method, recover_method,
            block_migration=False, migrate_data=None):
        self._migration_source.migrate(
            context, instance, dest, post_method, recover_method,
            block_migration, migrate_data)

    def live_migration_force_complete(self, instance):  # S
        self._migration_source.force_complete(instance)

    def live_migration_abort(self, instance):  # S
        self._migration_source.abort(instance)

    def post_live_migration(  # S
            self, context, instance, block_device_info, migrate_data=None):
        self._volumes.disconnect_all(block_device_info, instance)

    def post_live_migration_at_source(  # S
            self, context, instance, network_info):
        with driver_errors.after_the_move(instance):
            self.unplug_vifs(instance, network_info)

    def post_live_migration_at_destination(  # D
            self, context, instance, network_info, block_migration=False,
            block_device_info=None):
        with driver_errors.translated(
                instance, failure=exception.MigrationError):
            lost_power = handover.arrived(self._client, instance)
            if lost_power and CONF.resume_guests_state_on_host_boot:
                # The manager does not have it yet among those that it starts
                # then.
                self._power.resume(
                    context, instance, network_info, block_device_info)

    def rollback_live_migration_at_destination(  # D
            self, context, instance, network_info, block_device_info,
            destroy_disks=True, migrate_data=None):
        with driver_errors.translated(
                instance, failure=exception.MigrationError):
            self._migration_destination.rollback(
                instance, network_info, migrate_data)
