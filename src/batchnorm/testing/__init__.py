"""The conformance suite: batch norm against any array library.

``pytest --pyargs batchnorm.testing --array-library NAME`` runs it for NAME, a library of the
capability table or any importable module that offers the array API.
"""
