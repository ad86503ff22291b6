# By time, so what counts is how often: see openssl-sha256.sh. The check is a CTR encryption, since `enc` has no GCM.
echo hello | openssl enc -aes-128-ctr -K 000102030405060708090a0b0c0d0e0f -iv 0 | od -tx1
begin
openssl speed -seconds 1 -bytes 16384 -evp aes-128-gcm 2>out >/dev/null
finish "$(sed -n 's/.* size blocks: \([0-9]*\) .*/\1/p' out)"
