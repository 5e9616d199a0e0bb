//! The key exchange with secp521r1, which ring does not have. TLS 1.2 servers whose certificate has a key of this curve only
//! accept clients that offer it.

use openssl::bn::BigNumContext;
use openssl::derive::Deriver;
use openssl::ec::{EcGroup, EcKey, EcPoint, PointConversionForm};
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use rustls::crypto::{ActiveKeyExchange, SharedSecret, SupportedKxGroup};
use rustls::{Error, NamedGroup, PeerMisbehaved};

#[derive(Debug)]
pub(super) struct Secp521r1;

impl SupportedKxGroup for Secp521r1 {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let exchange = Exchange::start().map_err(|_| Error::FailedToGetRandomBytes)?;
        Ok(Box::new(exchange))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

struct Exchange {
    key: EcKey<Private>,
    public: Vec<u8>,
}

impl Exchange {
    fn start() -> Result<Self, ErrorStack> {
        let group = EcGroup::from_curve_name(Nid::SECP521R1)?;
        let key = EcKey::generate(&group)?;
        let form = PointConversionForm::UNCOMPRESSED;
        let public = key
            .public_key()
            .to_bytes(&group, form, &mut *BigNumContext::new()?)?;
        Ok(Self { key, public })
    }

    fn shared_secret(self, peer: &[u8]) -> Result<Vec<u8>, ErrorStack> {
        let group = self.key.group();
        let point = EcPoint::from_bytes(group, peer, &mut *BigNumContext::new()?)?;
        let peer = EcKey::from_public_key(group, &point)?;
        peer.check_key()?;
        let (key, peer) = (PKey::from_ec_key(self.key.clone())?, PKey::from_ec_key(peer)?);
        let mut deriver = Deriver::new(&key)?;
        deriver.set_peer(&peer)?;
        deriver.derive_to_vec()
    }
}

impl ActiveKeyExchange for Exchange {
    fn complete(self: Box<Self>, peer_pub_key: &[u8]) -> Result<SharedSecret, Error> {
        let secret = self.shared_secret(peer_pub_key);
        let secret = secret.map_err(|_| Error::from(PeerMisbehaved::InvalidKeyShare))?;
        Ok(SharedSecret::from(secret))
    }

    fn pub_key(&self) -> &[u8] {
        &self.public
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}
