# SPDX-License-Identifier: Apache-2.0
"""`s3://`, `gs://` and `az://`: objects in object stores, read through the optional package obstore."""
