//! The file in which a device's compiled kernels are kept.
//!
//! It begins with what tells that it is such a file, whole, and of this device and driver; one that is not is as none.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// The first bytes of the file.
const MAGIC: &[u8; 16] = b"rwkv-kernels 1\n\0";

/// A file of compiled kernels.
#[derive(Debug)]
pub(super) struct CacheFile {
    path: PathBuf,
    /// Of the device and its driver.
    key: String,
}

impl CacheFile {
    /// None where the adapter's driver has no such thing.
    pub(super) fn new(path: &Path, adapter: &wgpu::AdapterInfo) -> Option<Self> {
        let key = wgpu::util::pipeline_cache_key(adapter)?;
        Some(Self { path: path.to_owned(), key: format!("{key} {} {}", adapter.driver, adapter.driver_info) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The cache that the file holds, or an empty one.
    #[expect(unsafe_code, reason = "wgpu hands the data to the driver, which cannot check all of it")]
    pub(super) fn load(&self, device: &wgpu::Device) -> wgpu::PipelineCache {
        let stored = fs::read(&self.path).unwrap_or_default();
        let data = stored
            .split_at_checked(MAGIC.len() + 8)
            .and_then(|(head, data)| (head == self.head(data)).then_some(data));
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("kernels"), data, fallback: true };
        // SAFETY: the data are those that `save` had from `get_data` of a cache of this device and driver: their hash
        // and that of the key are in the file. Whoever forges it may as well replace the program.
        unsafe { device.create_pipeline_cache(&descriptor) }
    }

    /// Writes what the cache holds under a temporary name, and renames it.
    pub(super) fn save(&self, cache: &wgpu::PipelineCache) -> io::Result<()> {
        let Some(data) = cache.get_data() else { return Ok(()) };
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{}.part", std::process::id()));
        let part = PathBuf::from(name);
        let written = File::create(&part).and_then(|mut file| {
            file.write_all(&self.head(&data))?;
            file.write_all(&data)?;
            file.sync_all()
        });
        let done = written.and_then(|()| fs::rename(&part, &self.path));
        if done.is_err() {
            // What is half written is of no use; if it cannot be removed, the error says enough.
            let _ = fs::remove_file(&part);
        }
        done
    }

    /// What the file begins with if it holds `data`.
    fn head(&self, data: &[u8]) -> Vec<u8> {
        let mut hash = DefaultHasher::new();
        (&self.key, data).hash(&mut hash);
        [MAGIC.as_slice(), &hash.finish().to_le_bytes()].concat()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::gpu::{Device, Error, Request, device_for_tests};
    use crate::kernels::add::VARIANTS;
    use crate::pipeline::Pipeline;

    /// Compiles a kernel on a device that keeps it in `path`.
    fn compile(path: &std::path::Path) -> Result<(), Error> {
        let request = Request { cache: Some(path.to_owned()), ..Request::default() };
        let device = Device::open_with(&request)?;
        #[expect(unsafe_code, reason = "the kernel is not run")]
        // SAFETY: there is no dispatch.
        let pipeline = unsafe { Pipeline::new_unchecked(device.device(), &VARIANTS[0], &[], device.cache()) };
        pipeline?;
        device.save_cache()
    }

    #[test]
    fn a_file_is_kept_and_a_bad_one_is_as_none() {
        if device_for_tests().is_none_or(|of| wgpu::util::pipeline_cache_key(of.info()).is_none()) {
            return;
        }
        let folder = std::env::temp_dir().join(format!("rwkv-kernels-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("cache");
        compile(&path).unwrap();
        let first = fs::read(&path).unwrap();
        assert!(first.starts_with(super::MAGIC) && first.len() > super::MAGIC.len() + 8, "a file");
        compile(&path).unwrap();
        for bad in [&first[..first.len() - 1], &first[..20], b"", &[first.as_slice(), b"x"].concat()] {
            fs::write(&path, bad).unwrap();
            compile(&path).unwrap();
            assert!(fs::read(&path).unwrap().starts_with(super::MAGIC), "{} bytes are replaced", bad.len());
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no part is left");
        let missing = folder.join("missing").join("cache");
        assert!(matches!(compile(&missing), Err(Error::Cache { path, .. }) if path == missing), "no folder");
        fs::remove_dir_all(&folder).unwrap();
    }
}
