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

"""What a flavor or an image asks for and no container can have.

Most of what Nova knows of images is about the devices of virtual machines,
and nothing is missed without (``doc/source/user/image-properties.rst``). What
is refused here is asked for to be safe with it, or to run at all; the
scheduler sends most of it to no container host, but nobody asks it about a
host that is named, and not about the image of a rescue.
"""

from nova import exception
from nova.i18n import _
from nova.objects import fields
from oslo_utils import strutils


_HERE = fields.Architecture.from_host()


def _true(value):
    return strutils.bool_from_string(value)


def _required(value):
    return value == fields.SecureBoot.REQUIRED


def _other(value):
    return fields.Architecture.canonicalize(value) != _HERE


#: Property of an image → whether a value of it asks for it, and what is in the
#: way. The extra spec of flavors is named in the same way, with a colon.
REFUSED = {
    'hw_emulation_architecture': (_other, _(
        'nothing is emulated, programs run on the CPU of the host. Use an '
        'image for its architecture, without this')),
    'hw_ephemeral_encryption': (_true, _(
        'the disk of a container is not encrypted. Keep what has to be on an '
        'encrypted volume')),
    'hw_locked_memory': (_true, _(
        'the memory of a container is that of its host, which may swap it')),
    'hw_mem_encryption': (_true, _(
        'the memory of a container is that of its host, and is not '
        'encrypted')),
    'hw_tpm_model': (bool, _('a container has no TPM')),
    'hw_tpm_version': (bool, _('a container has no TPM')),
    'os_secure_boot': (_required, _(
        'a container has no firmware that could verify what it boots. Signed '
        'images and trusted certificates are verified')),
}


def extra_spec(name):
    """The flavors' name of an image's property."""
    return name.replace('_', ':', 1)


def check_flavor(flavor):
    """:raises nova.exception.InvalidInput: it asks for what is refused"""
    for name, (asks, reason) in REFUSED.items():
        spec = extra_spec(name)
        value = flavor.extra_specs.get(spec)
        if value is not None and asks(value):
            raise exception.InvalidInput(
                reason=_('flavor extra spec %(spec)s=%(value)s: %(reason)s') %
                {'spec': spec, 'value': value, 'reason': reason})


def check_image(image_id, properties):
    """As :func:`check_flavor`, of an image.

    :param properties: a nova.objects.ImageMetaProps
    :raises nova.exception.ImageUnacceptable: it asks for what is refused
    """
    for name, (asks, reason) in REFUSED.items():
        value = properties.get(name)
        if value is not None and asks(value):
            raise exception.ImageUnacceptable(
                image_id=image_id,
                reason=_('property %(name)s=%(value)s: %(reason)s') %
                {'name': name, 'value': value, 'reason': reason})
