"""A study as a job of a Ray cluster: submit it, follow it, stop it, and bring its best files back.

client.py       the jobs of one cluster, through the HTTP address of Ray's dashboard
request.py      what is submitted, checked before anything is sent
best_folder.py  the best folder on its way from the cluster

Laptop and cluster need share nothing but that address. The job runs `autotune tune` on the head node, with the code of
the machine that submitted it; the store outlives the job.
"""
