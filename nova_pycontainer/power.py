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

"""Start and stop containers that exist."""

import contextlib

from nova.compute import power_state
from nova.compute import vm_states
from oslo_log import log as logging

from nova_pycontainer import flavor
from nova_pycontainer import patience
from nova_pycontainer.runtime import errors
from nova_pycontainer import steps as driver_steps
from nova_pycontainer import vif

LOG = logging.getLogger(__name__)

#: The runtime's states in Nova's. A container that was made but never
#: started is off. One that is being started is neither on nor off; to call it
#: off could make Nova stop it.
POWER_STATES = {
    'defined': power_state.SHUTDOWN,
    'created': power_state.NOSTATE,
    'running': power_state.RUNNING,
    'paused': power_state.PAUSED,
    'suspended': power_state.SUSPENDED,
    # However it ended: on CRASHED Nova's handler of lifecycle events would
    # not act (ComputeManager.handle_lifecycle_event).
    'stopped': power_state.SHUTDOWN,
}

#: States with processes in them.
ALIVE = ('created', 'running', 'paused')
#: Of one in a list that the agent could not look at.
UNKNOWN = 'unknown'

#: Of what the agent accepts, in seconds.
_LONGEST_SHUTDOWN = 86400


def shutdown_s(timeout):
    """What is meant by ``os_shutdown_timeout``, which may be any number."""
    return min(max(timeout, 0), _LONGEST_SHUTDOWN)


class _Undone(errors.ContainerError):
    """It is as before, and may be tried again."""


class Power:
    """Turns containers on and off.

    :param client: client of the agent
    :param volumes: a nova_pycontainer.volume.Volumes
    :param arrivals: a nova_pycontainer.arrival.Arrivals
    :param conf: the options of ``[pycontainer]``
    """

    def __init__(self, client, volumes, arrivals, conf):
        self._client = client
        self._volumes = volumes
        self._arrivals = arrivals
        self._conf = conf

    def on(self, context, instance, network_info, block_device_info=None):
        """Start the container, unless it runs.

        :raises nova.exception.InstancePowerOnFailure: the root disk is not on
            this host
        :raises ContainerError: the agent's
        """
        state = self._existing(context, instance)['state']
        if state == 'running':
            # A power_on that a restart of nova-compute repeats.
            LOG.info('The container runs already', instance=instance)
            return
        if state in ALIVE:
            self._client.stop(instance.uuid, 0)
        self.bring_up(
            context, instance, network_info, block_device_info, 'power_on')

    def resume(self, context, instance, network_info, block_device_info=None):
        """Start the container after the host's boot, unless it lives."""
        if self._existing(context, instance)['state'] not in (
                'running', 'paused'):
            self.on(context, instance, network_info, block_device_info)

    def reboot(self, context, instance, network_info, block_device_info,
               timeout):
        """Stop the container, if it lives, and start it.

        :param timeout: as for :meth:`off`; 0 for a hard reboot
        :raises nova.exception.InstancePowerOnFailure: the root disk is not on
            this host
        :raises ContainerError: the agent's
        """
        if self._existing(context, instance)['state'] in ALIVE:
            self._client.stop(instance.uuid, shutdown_s(timeout))
        self.bring_up(
            context, instance, network_info, block_device_info, 'reboot')

    def bring_up(self, context, instance, network_info, block_device_info,
                 verb):
        """Start a stopped container as Nova's database describes it.

        The interfaces of a container end with it, so they are made anew; the
        flavor's limits are set again. What is there already is left alone.

        :param block_device_info: None: its volumes are as they were
        """
        uuid = instance.uuid
        info = self._client.info(uuid)
        if info.get('incoming'):
            self._arrivals.rest(instance)
        else:
            # It may have come while nobody looked.
            self._arrivals.note(instance, info)
        if (info.get('rescue') and verb != 'rescue' and
                instance.vm_state != vm_states.RESCUED):
            # A rescue or its end has failed: it gets its own root, as a
            # virtual machine does.
            LOG.warning('It is not to be rescued any more',
                        instance=instance)
            self._client.unrescue(uuid)
        if info.get('offered'):
            # Only the host that Nova says the server is on is asked to start
            # it: a resize ended before it was another's.
            LOG.warning('Its resize has ended early: it stays here',
                        instance=instance)
            self._client.transfer_withdraw(uuid)
        with self._wired(context, instance, network_info, block_device_info,
                         verb) as (steps, changes):
            with steps.step('prepare', undo=lambda: self._kill(uuid)):
                self._client.prepare(uuid, changes)
            with steps.step('start'):
                self._client.start_container(uuid)

    def restore(self, context, instance, network_info, block_device_info=None):
        """Let a suspended container go on, with its memory.

        :raises nova.exception.InstancePowerOnFailure: the root disk is not on
            this host
        :raises ContainerError: the agent's; it is suspended as before
        """
        if self._existing(context, instance)['state'] == 'running':
            # A resume that a restart of nova-compute repeats.
            LOG.info('The container runs already', instance=instance)
            return

        def restore():
            with self._wired(context, instance, network_info,
                             block_device_info, 'resume') as (steps, changes):
                with steps.step('restore'):
                    self._restore(instance, changes)

        try:
            restore()
        except _Undone as e:
            LOG.warning('%s', e, instance=instance)
            restore()

    def _restore(self, instance, changes):
        try:
            self._client.resume(instance.uuid, changes)
        except errors.AgentUnavailable as e:
            state = patience.call(self._client.info, instance.uuid)['state']
            if state == 'suspended':
                # Inside of the steps, which make the interfaces anew.
                raise _Undone(
                    'bad_state', 'the agent was restarted in the middle of '
                    'the resume, and the instance is suspended as before',
                    uuid=instance.uuid, remedy='Resume it again') from e
            if state != 'running':
                raise

    @contextlib.contextmanager
    def _wired(self, context, instance, network_info, block_device_info,
               verb):
        """Make a container's interfaces, and connect its volumes, before
        the body starts it.

        :yields: the steps, and what of the container's specification is new
        """
        uuid = instance.uuid
        with self._volumes.connecting(instance), driver_steps.Steps(
                verb, instance) as steps:
            with steps.step('network'):
                nics = vif.nics_of(
                    instance, network_info, self._conf.tx_offload)
                changes = {
                    'nics': nics,
                    'resources': flavor.resources_of(
                        instance, self._conf.pids_max),
                }
                if verb != 'resume':
                    # What has run with the other value is in its memory.
                    changes['nesting'] = flavor.nesting(instance)
            if block_device_info is not None:
                with steps.step('volumes'):
                    changes['volumes'] = self._volumes.connect_all(
                        context, block_device_info, instance)
                    root = self._volumes.connect_root(
                        context, block_device_info, instance)
                    if root is not None:
                        changes['root'] = root
            with steps.step('unplug_vifs'):
                # The switch may still have the ports of the interfaces that
                # ended: Open vSwitch's userspace datapath does not see that
                # a new interface has the name of one that is gone.
                vif.unplug(instance, network_info)
            with steps.step('plug'):
                self._client.plug(uuid, nics)
            with steps.step('plug_vifs'):
                vif.plug(instance, network_info)
            yield steps, changes
            steps.success()

    def suspend(self, instance):
        """Save the container's memory and end it, unless that is done.

        :raises ContainerError: the agent's; it runs on
        """
        try:
            self._suspend(instance)
        except errors.AgentUnavailable as e:
            LOG.warning('%s', e, instance=instance)
            info = patience.call(self._client.info, instance.uuid)
            if info['state'] != 'suspended':
                self._suspend(instance)

    def _suspend(self, instance):
        try:
            self._client.suspend(instance.uuid)
        except errors.ContainerError as e:
            # A request that waited while nova-compute was restarted, which
            # has done it then.
            if e.code != 'bad_state' or (
                    self._client.info(instance.uuid)['state'] != 'suspended'):
                raise
            LOG.info('The container is suspended already', instance=instance)

    def off(self, instance, timeout):
        """Stop the container.

        :param timeout: seconds that the guest has to shut down by itself; 0
            kills it at once
        """
        try:
            self._client.stop(instance.uuid, shutdown_s(timeout))
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            LOG.warning('There is no container to stop', instance=instance)

    def _kill(self, uuid):
        if self._client.info(uuid)['state'] in ALIVE:
            self._client.stop(uuid, 0)

    def state(self, instance):
        """Return the power state.

        :raises ContainerError: the agent's; ``not_found``
        """
        # A state that this version does not know is no reason to stop it.
        return POWER_STATES.get(self._client.info(instance.uuid)['state'],
                                power_state.NOSTATE)

    def _existing(self, context, instance):
        """Return what the agent knows of a container that must exist."""
        info = self._client.find(instance.uuid)
        if info is not None:
            return info
        self._arrivals.missing(context, instance)
        return self._client.info(instance.uuid)
