"""From footage of a person to what training takes of it: frames, crop, where the face is, reference faces.

scan_footage -> Scan: faces and cuts; plan_take -> Plan: which frames, which crop; take_footage -> Take: pixels.
A scan and a plan hold numbers only. The one kind of network used is the model's own face nets.
"""
