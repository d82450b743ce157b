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

"""Rescue: a server with the root of another image, and its own in ``/mnt``."""

from nova import exception
from nova.image import glance
from nova import objects
from nova.virt import configdrive as nova_configdrive
from nova.virt import driver as nova_driver

from nova_pycontainer import configdrive
from nova_pycontainer import flavor
from nova_pycontainer import promises
from nova_pycontainer import steps as driver_steps


def failure(reason):
    """Nova puts its own words around it, and sets the server to ERROR."""
    return exception.NovaException(reason)


class Rescuer:
    """Rescues servers that are down.

    :param client: client of the agent
    :param images: a nova_pycontainer.image.Images
    :param power: a nova_pycontainer.power.Power
    """

    def __init__(self, client, images, power):
        self._client = client
        self._images = images
        self._power = power
        self._api = glance.API()

    def rescue(self, context, instance, network_info, image_meta, password,
               block_device_info):
        """Start the server with the root of an image.

        :raises nova.exception.NovaException: the image cannot be had
        :raises ContainerError: the agent's; the server is down, with its own
            root
        """
        uuid = instance.uuid
        with driver_steps.Steps('rescue', instance) as steps:
            with steps.step('image'):
                promises.check_image(image_meta.id, image_meta.properties)
                layer = self._images.ensure(context, instance, image_meta)
                properties = self._api.get(
                    context, image_meta.id).get('properties') or {}
                init = flavor.init_of(
                    image_meta.id, properties.get('pycontainer_init'),
                    properties.get('pycontainer_stop_signal'))
            with steps.step('config_drive'):
                nova_configdrive.update_instance(instance)
                files = configdrive.files(
                    instance, [], password, network_info)
            with steps.step('rescue', lambda: self._client.unrescue(uuid)):
                self._client.rescue(uuid, {
                    'layer': layer, 'image_id': image_meta.id, 'init': init,
                    'config_drive': files})
            with steps.step('start'):
                self._power.bring_up(
                    context, instance, network_info, block_device_info,
                    'rescue')
            steps.success()

    def unrescue(self, context, instance):
        """Start the server with its own root.

        :raises ContainerError: the agent's
        """
        self._client.unrescue(instance.uuid)
        self._power.bring_up(
            context, instance, instance.get_network_info(),
            nova_driver.get_block_device_info(
                instance, objects.BlockDeviceMappingList.
                get_by_instance_uuid(context, instance.uuid)), 'unrescue')
