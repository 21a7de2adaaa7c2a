"""The only door to what other libraries do not document: one file a library, with a test that says what it needs.

Nothing else in edgeship names a private name of another library (``tests/contracts/test_private_names.py``), so that
an upgrade that breaks something is one file here, and one red file in ``tests/compat/``.
"""
