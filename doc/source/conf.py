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

# Sphinx configuration; see https://www.sphinx-doc.org/ for the options.

extensions = [
    'openstackdocstheme',
    'oslo_config.sphinxconfiggen',
    'oslo_config.sphinxext',
]

project = 'nova-pycontainer'
copyright = 'nova-pycontainer developers'
exclude_patterns = []

html_theme = 'openstackdocs'
html_static_path = []
openstackdocs_auto_name = False
pygments_style = 'native'

# The sample is generated anew with every build.
config_generator_config_file = [
    ('../../etc/nova/pycontainer-config-generator.conf',
     '_static/pycontainer'),
    ('../../etc/nova/pycontainer-agent-config-generator.conf',
     '_static/pycontainer-agent'),
]
