"""At home in JAX: the passes as primitives of JAX, and what exported programs need, who import this."""

import jax.export

from batchnorm.jax import handlers
from batchnorm.moments import Moments

jax.export.register_namedtuple_serialization(Moments, serialized_name="batchnorm.Moments")
handlers.register()
