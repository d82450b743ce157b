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

"""The flavors' extra specs of the driver's own, for Nova's API.

Without them nova-api takes whatever a flavor says under ``pycontainer:``, and
the mistake shows when a server is made. What is found by the entry point
``nova.api.extra_spec_validators`` (``nova.api.validation.extra_specs``).
"""

from nova.api.validation.extra_specs import base

from nova_pycontainer import flavor


def register():
    return [
        base.ExtraSpecValidator(
            name='pycontainer:pids_max',
            description='The number of processes and threads that a server '
                        'may have. Only for the pycontainer driver.',
            value={'type': int, 'min': flavor.PIDS_MIN,
                   'description': 'Processes and threads'}),
        base.ExtraSpecValidator(
            name='pycontainer:nesting',
            description='Whether a server may make containers of its own. '
                        'Only for the pycontainer driver.',
            value={'type': str, 'enum': [*flavor.NESTING],
                   'description': 'allowed: if the image asks for it'}),
    ]
