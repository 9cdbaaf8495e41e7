"""A node beside an Orthanc server: projects the CT series that arrive there and stores the results back.

orthanc.py speaks to the server, changes.py follows its change log, state.py remembers on disk, node.py does the work,
server.py shows it; docs/PACS.md says how to run it.
"""
