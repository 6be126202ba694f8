"""OpenVINO: reading what its weight compression (NNCF) wrote."""
