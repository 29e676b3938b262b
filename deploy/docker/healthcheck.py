"Leaves with 0 where the service of this container answers 200 on a path; arguments: the path and, if it is not 8000, the port."
import http.client
import sys

# Not urllib, which would ask the proxy of the environment for the container's own address.
service = http.client.HTTPConnection("127.0.0.1", int((*sys.argv, 8000)[2]), timeout=3)
try:
    service.request("GET", sys.argv[1])
    sys.exit(service.getresponse().status != 200)
except (OSError, http.client.HTTPException) as e: sys.exit(f"{sys.argv[1]}: {e}")
